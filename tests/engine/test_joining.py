"""Requests that arrive together with one prefix: the first computes it, and the others wait for it."""

from __future__ import annotations

from jamba_server.engine import joining
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import CacheUse, Request, SamplingParams
from tests.engine.simulator import Simulator, make_scheduler

SHARED = list(range(1000, 1100))


def fresh(**sizes: int) -> tuple[Scheduler, Simulator]:
    defaults = {"num_pages": 400, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    scheduler = make_scheduler(**defaults | sizes)  # type: ignore[arg-type]
    return scheduler, Simulator(scheduler)


def request(name: str, prompt: list[int], **fields: object) -> Request:
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=2), **fields)  # type: ignore[arg-type]


def hits(scheduler: Scheduler, simulator: Simulator, *requests: Request) -> dict[str, int]:
    """The numbers of cached tokens, by the name of the request."""
    scheduler.add(requests, now=0.0)
    found: dict[str, int] = {}
    while scheduler.has_work:
        for update in simulator.step(lambda _: 1):
            if update.num_cached is not None:
                found[update.request_id] = update.num_cached
    return found


def test_the_common_prefix_is_computed_once() -> None:
    scheduler, simulator = fresh()
    requests = [request(f"r{i}", [*SHARED, *[i] * 9]) for i in range(4)]
    assert hits(scheduler, simulator, *requests) == {"r0": 0, "r1": 100, "r2": 100, "r3": 100}
    assert scheduler.stats.num_joined_total == 3


def test_a_state_at_the_end_of_a_message_is_waited_for_rather_than_one_more() -> None:
    scheduler, simulator = fresh()
    requests = [request(f"r{i}", [*SHARED, *[i] * 9], save_positions=(90,)) for i in range(2)]
    assert hits(scheduler, simulator, *requests) == {"r0": 0, "r1": 88}


def test_a_short_prefix_is_not_waited_for() -> None:
    scheduler, simulator = fresh(max_num_batched_tokens=200)
    requests = [request(f"r{i}", [*SHARED[:60], *[i] * 9]) for i in range(2)]
    scheduler.add(requests, now=0.0)
    simulator.step(lambda _: 1)
    assert len(scheduler.running) == 2


def test_what_the_cache_has_already_is_not_waited_for() -> None:
    scheduler, simulator = fresh()
    hits(scheduler, simulator, request("before", SHARED, save_positions=(100,)))
    scheduler.add([request(f"r{i}", [*SHARED, *[i] * 40]) for i in range(2)], now=0.0)
    simulator.step(lambda _: 1)
    assert len(scheduler.running) == 2


def test_other_salts_and_requests_that_do_not_read_or_write_do_not_wait() -> None:
    for first, second in (
        ({"cache_salt": "a"}, {}),
        ({"cache": CacheUse(write=False)}, {}),
        ({}, {"cache": CacheUse(read=False)}),
    ):
        scheduler, simulator = fresh(max_num_batched_tokens=64)
        scheduler.add([request("r0", SHARED, **first), request("r1", SHARED, **second)], now=0.0)
        simulator.step(lambda _: 1)
        simulator.step(lambda _: 1)
        assert len(scheduler.running) == 2


def test_an_urgent_request_does_not_wait_for_a_less_urgent_one() -> None:
    scheduler, simulator = fresh()
    scheduler.add([request("slow", SHARED, priority=1)], now=0.0)
    simulator.step(lambda _: 1)
    scheduler.add([request("fast", SHARED, priority=0)], now=0.0)
    simulator.step(lambda _: 1)
    assert len(scheduler.running) == 2


def test_the_end_of_the_first_request_ends_the_wait() -> None:
    scheduler, simulator = fresh()
    scheduler.add([request(f"r{i}", [*SHARED, *[i] * 9]) for i in range(2)], now=0.0)
    simulator.step(lambda _: 1)
    assert [seq.request.id for seq in scheduler.running] == ["r0"]
    scheduler.abort(["r0"])
    simulator.step(lambda _: 1)
    assert [seq.request.id for seq in scheduler.running] == ["r1"]


def test_others_go_ahead_of_those_that_wait() -> None:
    scheduler, simulator = fresh()
    requests = [*(request(f"r{i}", [*SHARED, *[i] * 9]) for i in range(2)), request("other", [5] * 20)]
    scheduler.add(requests, now=0.0)
    simulator.step(lambda _: 1)
    simulator.step(lambda _: 1)
    assert {seq.request.id for seq in simulator.texts} == {"r0", "other"}


def test_a_wait_ends_when_others_take_too_long() -> None:
    """The first request makes no progress, because shorter prompts keep arriving."""
    scheduler, simulator = fresh(max_model_len=190, num_pages=800)
    scheduler.add([request(f"r{i}", [*SHARED, *[i] * 9]) for i in range(2)], now=0.0)
    simulator.step(lambda _: 1)
    joined = scheduler.joining
    [waiting] = list(scheduler.waiting)
    assert joined.must_wait(waiting, scheduler.running, waiting.waits_until)
    assert not joined.must_wait(waiting, scheduler.running, waiting.waits_until + 1)
    lacking = 100 + 32 * joining.MAX_WAIT_STEPS
    assert 0 < waiting.waits_until <= joining.MAX_WAIT * 100 + lacking


def test_a_chain_of_waits_ends() -> None:
    """Each request shares more with the next one: all of them end, and what two of them share is computed once."""
    scheduler, simulator = fresh(max_model_len=600, num_pages=800)
    text = list(range(500))
    requests = [request(f"r{i}", [*text[: 100 * i], *[1000 + i] * 9]) for i in range(1, 6)]
    found = hits(scheduler, simulator, *requests)
    computed = sum(len(r.prompt) - found[r.id] for r in requests)
    assert computed <= 500 + 5 * 9 + 5 * 4
