"""Random work on random sizes: nothing corrupted, nothing leaked, everything finished."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from jamba_server.engine.scheduler import Scheduler, SchedulerOutput
from jamba_server.engine.types import CacheReport, Request, SamplingParams
from tests.engine.cache_checks import CacheChecks
from tests.engine.host_states import HostStates
from tests.engine.simulator import Simulator, make_scheduler, random_request
from tests.nightly import nightly

NUM_REQUESTS = 30


EOS = 5  # in no prompt


def some_scheduler(random: Random, kind: str, stages: int) -> Scheduler:
    block_size = random.choice((1, 2, 4, 8))
    num_pages = random.randint(24 // block_size + 8, 200 // block_size + 30)
    max_len = min((num_pages - 2) * block_size, 60)
    max_num_seqs = random.randint(1, 6)
    more = random.randint(1, 7)
    compressed, num_slots = kind == "compressed", 1 + max_num_seqs + more
    return make_scheduler(
        num_pages=num_pages,
        num_slots=1 + max_num_seqs + more // 2 if compressed else num_slots,
        num_compressed=1 + more if compressed else 0,
        store=HostStates(num_slots, random.randint(2, 9)) if kind == "host" else None,
        block_size=block_size,
        interval=block_size * random.choice((1, 2, 4, 16)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=(most := random.randint(1, 30)),
        max_num_mixed_tokens=Random(num_pages).randint(1, most) if stages == 1 else most,
        max_model_len=max_len,
        caching=random.random() < 0.9 or kind != "slots",
        num_stages=stages,
    )


def run(seed: int, kind: str, *, ahead: bool, stages: int = 1) -> Counter[str]:
    random = Random(seed)
    scheduler = some_scheduler(random, kind, stages)
    max_len = scheduler.max_model_len
    scheduler.eos_token_ids = frozenset({EOS})
    scheduler.joining.min_saved = random.choice((1, 8, 64))
    simulator, checks = Simulator(scheduler, ahead=ahead, stages=stages), CacheChecks(scheduler)
    stems = [[random.randrange(5) for _ in range(random.randint(1, max_len))] for _ in range(4)]
    requests = [random_request(random, i, stems, max_len) for i in range(NUM_REQUESTS)]
    fresh, left = list(requests), {r.id: r for r in requests}
    generated: dict[str, int] = Counter()
    replies = {request.id: list[int]() for request in requests}
    requests_by_id = {request.id: request for request in requests}
    aborted = stopped = forced = explained = 0
    while left or simulator.under_way:
        assert simulator.time < 20_000, "livelock"
        if fresh and (random.random() < 0.5 or not scheduler.has_work):
            new = [fresh.pop() for _ in range(min(len(fresh), random.randint(1, 6)))]
            scheduler.add(new, now=simulator.time)
        if random.random() < 0.02:
            victim: Request = random.choice(requests)
            scheduler.abort([victim.id])
            if victim not in fresh:
                aborted += left.pop(victim.id, None) is not None
        for update in simulator.step(lambda _: EOS if random.random() < 0.03 else random.randrange(5)):
            generated[update.request_id] += len(update.token_ids)
            replies[update.request_id] += update.token_ids
            if update.cache is not None:
                check_report(update.cache, requests_by_id[update.request_id])
                explained += 1
            if not requests_by_id[update.request_id].cache.read:
                assert not update.num_cached, "a request that must not read has read"
            if update.finish_reason:
                ended = next(seq for seq in simulator.texts if seq.request.id == update.request_id)
                checks.end(ended, list(ended.tokens), update.num_pinned)
                request = left.pop(update.request_id)
                allowed = min(request.params.max_tokens, max_len - len(request.prompt))
                if update.finish_reason == "stop":
                    stopped += 1
                    assert update.token_ids[-1] == EOS
                    allowed = min(allowed, generated[request.id])
                assert generated[request.id] == allowed, "a reply has the wrong length"
                budget, end = request.params.thinking_token_budget, request.params.thinking_end
                if budget is not None and len(replies[request.id]) >= budget + len(end):
                    assert tuple(replies[request.id][budget : budget + len(end)]) == end
                    forced += len(end)
        checks.take_pins()
        checks.unpin([name for name in checks.held if random.random() < 0.05])
    assert not scheduler.has_work
    return what_happened(simulator, checks) + Counter(
        aborted=aborted, stopped=stopped, forced=forced, ahead=simulator.num_ahead, explained=explained
    )


def what_happened(simulator: Simulator, checks: CacheChecks) -> Counter[str]:
    """Checks what is left when nothing runs any more, and counts what happened."""
    stats = simulator.scheduler.stats
    assert stats.kv_blocks_used == 0
    assert stats.state_slots_used == 0
    simulator.finish()
    checks.finish(simulator.texts)
    checks.unpin([*checks.held])
    assert not stats_of_pins(simulator.scheduler)
    return Counter(
        hits=stats.prefix_hits_total,
        preemptions=stats.num_preemptions_total,
        missed_no_state=stats.missed_no_state_total,
        missed_evicted=stats.missed_evicted_total,
        saves=simulator.num_saves,
        saved=simulator.num_saved,
        tail_hits=simulator.num_tail_hits,
        vectors=simulator.num_vectors,
        waits=checks.num_waits,
        joined=stats.num_joined_total,
        pins=checks.num_pins,
        evicted_pins=checks.num_evicted_pins,
        only_copies=simulator.num_only_copies,
    )


def stats_of_pins(scheduler: Scheduler) -> int:
    return scheduler.stats.pinned_blocks + scheduler.stats.pinned_states


def check_report(report: CacheReport, request: Request) -> None:
    limit = len(request.prompt) + len(request.generated)
    assert 0 <= report.used_tokens <= min(report.kv_tokens, report.state_tokens) <= limit
    assert (report.tier is None) == (report.used_tokens == 0)
    assert sum(report.missed.values()) <= len(request.prompt) - report.used_tokens or len(report.missed) > 1
    if report.reason in ("no_state", "evicted", "salt") and report.kv_tokens < len(request.prompt) - 1:
        assert report.missed[report.reason] > 0


FIRST_SEEDS = [(0, False), (50, False), (100, False), (150, True), (200, True)]  # with whether steps run ahead
KINDS = [
    *(("slots", *seeds) for seeds in FIRST_SEEDS),
    ("compressed", 250, False),
    *(("compressed", *seeds) for seeds in FIRST_SEEDS[1:]),
    ("host", 0, False),
    ("host", 150, True),
]
SOME_KINDS = [
    (kind, first, ahead) for kind in ("slots", "compressed", "host") for first, ahead in ((0, False), (150, True))
]
NUM_SEEDS = 16  # enough for every event of `check_events`


@pytest.mark.parametrize(("kind", "first", "ahead"), SOME_KINDS)
def test_random_work(kind: str, first: int, ahead: bool) -> None:
    check_seeds(range(first, first + NUM_SEEDS), kind, ahead=ahead)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "first", "ahead"), KINDS)
def test_more_random_work(kind: str, first: int, ahead: bool) -> None:
    check_seeds(range(first, first + 50), kind, ahead=ahead)


def check_seeds(seeds: range, kind: str, *, ahead: bool) -> None:
    total: Counter[str] = Counter()
    for seed in seeds:
        total += run(seed, kind, ahead=ahead)
    assert (total.pop("ahead", 0) > 0) == ahead
    check_events(total)


@pytest.mark.parametrize("seeds", [range(14, 20), *nightly([range(20)])], ids=str)
def test_random_work_of_several_stages(seeds: range) -> None:
    total: Counter[str] = Counter()
    for kind, stages in (("slots", 2), ("slots", 4), ("compressed", 3)):
        for seed in seeds:
            total += run(100 * stages + seed, kind, ahead=False, stages=stages)
    assert "ahead" not in total
    assert total["only_copies"] > 0, "no step had copies for sequences that had to make room at once"
    check_events(total)


def check_events(total: Counter[str]) -> None:
    for event in (
        "hits",
        "preemptions",
        "missed_no_state",
        "missed_evicted",
        "saves",
        "saved",
        "tail_hits",
        "aborted",
        "stopped",
        "forced",
        "vectors",
        "waits",
        "joined",
        "pins",
        "explained",
    ):
        assert total[event] > 0, f"the fuzz never saw {event}"


def test_prompts_of_the_budgets_length_take_a_step_each() -> None:
    """However many replies run beside them: of a burst the first tokens come at even intervals."""
    scheduler = make_scheduler(num_pages=200, max_num_seqs=8, max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=20)
    scheduler.add([Request(id=str(i), prompt=[i] * 32, params=params) for i in range(8)], now=0.0)
    simulator = Simulator(scheduler)
    firsts = [
        [update.request_id for update in simulator.step(lambda _: 9) if update.queue_seconds is not None]
        for _ in range(8)
    ]
    assert firsts == [[str(i)] for i in range(8)]


@pytest.mark.parametrize("ahead", [False, True])
def test_no_decision_depends_on_the_clock(ahead: bool) -> None:
    """Only what a request waited for is told by it: several ranks that take in the same requests schedule the same."""

    def decisions(second: float) -> list[object]:
        random = Random(5)
        scheduler = make_scheduler(num_pages=40, max_model_len=60, interval=8)
        simulator, taken = Simulator(scheduler, ahead=ahead, second=second), list[object]()
        schedule = scheduler.schedule

        def recorded(*, now: float) -> SchedulerOutput:
            output = schedule(now=now)
            taken.append([(c.sequence.request.id, c.start, c.end, list(c.sequence.block_ids)) for c in output.chunks])
            taken.append(output.copies)
            return output

        scheduler.schedule = recorded
        stems = [[random.randrange(5) for _ in range(40)] for _ in range(3)]
        requests = [random_request(random, i, stems, 60) for i in range(40)]
        while requests or scheduler.has_work or simulator.under_way:
            if requests and random.random() < 0.5:
                scheduler.add([requests.pop()], now=simulator.time)
            simulator.step(lambda _: random.randrange(5))
        return taken

    assert decisions(1.0) == decisions(-1e6) == decisions(0.0)
