"""What the prefix cache finds, and how it explains what it does not find."""

from __future__ import annotations

import pytest

from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from tests.engine.simulator import Simulator, make_scheduler


def run(
    scheduler: Scheduler, simulator: Simulator, prompt: list[int], *, new_tokens: int = 1, **fields: object
) -> list[TokenUpdate]:
    number = scheduler.stats.num_steps_total
    request = Request(id=f"r{number}", prompt=prompt, params=SamplingParams(max_tokens=new_tokens), **fields)  # type: ignore[arg-type]
    scheduler.add([request], now=0.0)
    updates: list[TokenUpdate] = []
    while scheduler.has_work:
        updates += simulator.step(lambda chunk: 900 + chunk.end)
    return updates


def cached(updates: list[TokenUpdate]) -> int | None:
    return updates[0].num_cached


def fresh(**sizes: int) -> tuple[Scheduler, Simulator]:
    scheduler = make_scheduler(**sizes)  # type: ignore[arg-type]
    return scheduler, Simulator(scheduler)


EITHER_KIND = pytest.mark.parametrize("num_compressed", [0, 8])  # in the slots that sequences run in, and compressed


@EITHER_KIND
def test_the_same_prompt_again_leaves_one_token_of_a_short_one_and_at_most_one_block(num_compressed: int) -> None:
    for length in range(1, 20):
        scheduler, simulator = fresh(block_size=4, num_compressed=num_compressed)
        prompt = list(range(length))
        assert cached(run(scheduler, simulator, prompt)) == 0
        assert cached(run(scheduler, simulator, prompt)) == (length - 1 if length <= 4 else (length - 1) // 4 * 4)


@EITHER_KIND
def test_the_next_turn_reuses_the_whole_last_one_also_below_a_block(num_compressed: int) -> None:
    for length in range(1, 20):
        scheduler, simulator = fresh(block_size=8, num_compressed=num_compressed)
        prompt = list(range(length))
        answer = [t for u in run(scheduler, simulator, prompt, new_tokens=3) for t in u.token_ids]
        # the state after the last token but one: the last one was sampled, not computed
        assert cached(run(scheduler, simulator, [*prompt, *answer, 77, 78])) == length + 2


@EITHER_KIND
def test_a_message_boundary_pays_from_its_second_request(num_compressed: int) -> None:
    scheduler, simulator = fresh(block_size=4, num_compressed=num_compressed)
    system = list(range(50, 71))
    run(scheduler, simulator, [*system, 1, 2, 3, 4, 5, 6], save_positions=(21,))
    assert cached(run(scheduler, simulator, [*system, 6, 5, 4, 3, 2, 1], save_positions=(21,))) == 20


@EITHER_KIND
def test_a_branch_point_pays_from_its_third_request(num_compressed: int) -> None:
    scheduler, simulator = fresh(block_size=4, num_compressed=num_compressed)
    shared = list(range(50, 74))
    hits = [cached(run(scheduler, simulator, [*shared, *[i] * 9])) for i in range(3)]
    assert hits == [0, 0, 24]
    assert scheduler.stats.missed_no_state_total == 24


def test_of_two_states_before_the_end_of_the_pages_the_later_one_is_taken() -> None:
    scheduler, simulator = fresh(block_size=4)
    shared = list(range(50, 78))
    run(scheduler, simulator, [*shared, *[1] * 9], save_positions=(8, 20))
    assert cached(run(scheduler, simulator, [*shared[:26], *[2] * 9])) == 20
    assert scheduler.stats.missed_no_state_total == 4


def test_a_salt_separates_tenants() -> None:
    scheduler, simulator = fresh()
    prompt = list(range(30))
    run(scheduler, simulator, prompt, cache_salt="a")
    assert cached(run(scheduler, simulator, prompt, cache_salt="b")) == 0
    assert cached(run(scheduler, simulator, prompt, cache_salt="a")) == 28


def test_prompt_logprobs_do_not_read_the_cache() -> None:
    scheduler, simulator = fresh()
    prompt = list(range(30))
    run(scheduler, simulator, prompt)
    request = Request(id="scored", prompt=prompt, params=SamplingParams(max_tokens=1, prompt_logprobs=0))
    scheduler.add([request], now=0.0)
    assert simulator.step(lambda _: 1)[0].num_cached == 0


def test_evicted_prefixes_are_counted_as_evicted() -> None:
    scheduler, simulator = fresh(num_pages=14, block_size=4, max_model_len=44)
    prompt = list(range(40))
    run(scheduler, simulator, prompt)
    run(scheduler, simulator, [t + 100 for t in prompt])
    run(scheduler, simulator, prompt)
    assert scheduler.stats.prefix_hits_total == 0
    assert scheduler.stats.missed_evicted_total > 0


def test_interior_states_cost_no_step() -> None:
    steps: list[int] = []
    for save_positions in ((), (400, 800, 1200, 1600)):
        scheduler, simulator = fresh(
            num_pages=600, block_size=4, max_num_batched_tokens=512, max_model_len=2100, interval=4096
        )
        run(scheduler, simulator, list(range(2000)), save_positions=save_positions)
        steps.append(scheduler.stats.num_steps_total)
    assert steps == [4, 4]
    assert simulator.num_saves == 6  # the four, and the prompt's end: 2,000 and the block before it


def test_choices_of_one_prompt_compute_it_once() -> None:
    scheduler, simulator = fresh(num_pages=100, block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=4)
    prompt = list(range(62))
    scheduler.add([Request(id=f"c{i}", prompt=prompt, params=params, index=i, group="g") for i in range(4)], now=0.0)
    hits: dict[str, int] = {}
    while scheduler.has_work:
        for update in simulator.step(lambda _: 1):
            if update.num_cached is not None:
                hits[update.request_id] = update.num_cached
    assert hits == {"c0": 0, "c1": 60, "c2": 60, "c3": 60}


def test_choices_join_together_once_the_prompt_is_computed() -> None:
    scheduler, simulator = fresh(num_pages=100, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=4)
    requests = [Request(id=f"c{i}", prompt=list(range(62)), params=params, index=i, group="g") for i in range(4)]
    scheduler.add(requests, now=0.0)
    running: list[int] = []
    for _ in range(2):
        simulator.step(lambda _: 1)
        running.append(len(scheduler.running))
    assert running == [1, 4]


def test_choices_that_do_not_read_the_cache_do_not_wait_for_it() -> None:
    scheduler, simulator = fresh(num_pages=100, block_size=4, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    scheduler.add([Request(id=f"c{i}", prompt=list(range(20)), params=params, group="g") for i in range(3)], now=0.0)
    simulator.step(lambda _: 1)
    assert len(scheduler.running) == 3


def test_generated_tokens_of_a_replayed_request_are_no_missed_prompt_tokens() -> None:
    scheduler, simulator = fresh(block_size=4)
    shared = list(range(50, 74))
    run(scheduler, simulator, [*shared, *[0] * 9])
    run(scheduler, simulator, shared[:5], new_tokens=40, generated=[*shared[5:], *[1] * 9])
    assert scheduler.stats.prefix_queries_total == 33 + 5
    assert scheduler.stats.missed_no_state_total == 5


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_prompt_waits_until_it_fits(caching: bool) -> None:
    """Else it fills what the older sequence leaves, is preempted, and begins again, as often as that one has steps."""
    scheduler, simulator = fresh(
        num_pages=51, block_size=4, max_num_batched_tokens=16, max_model_len=190, caching=caching
    )
    for name, length, new_tokens in (("old", 80, 40), ("young", 150, 1)):
        params = SamplingParams(max_tokens=new_tokens)
        scheduler.add([Request(id=name, prompt=[length] * length, params=params)], now=0.0)
    while scheduler.has_work:
        simulator.step(lambda _: 1)
    assert scheduler.stats.num_preemptions_total == 1


def test_an_aborted_sibling_does_not_strand_the_others() -> None:
    scheduler, simulator = fresh(num_pages=100, block_size=4, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=2)
    prompt = list(range(60))
    scheduler.add([Request(id=f"c{i}", prompt=prompt, params=params, group="g") for i in range(2)], now=0.0)
    simulator.step(lambda _: 1)
    scheduler.abort(["c0"])
    finished = [u.request_id for _ in range(12) for u in simulator.step(lambda _: 1) if u.finish_reason]
    assert finished == ["c1"]


def start(scheduler: Scheduler, name: str, prompt: list[int], **fields: object) -> None:
    request = Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=9), **fields)  # type: ignore[arg-type]
    scheduler.add([request], now=0.0)


def test_a_reply_that_ends_is_compressed_by_the_next_step_before_anybody_goes_on_from_it() -> None:
    scheduler, simulator = fresh(block_size=4, num_slots=3, num_compressed=4, max_num_seqs=1)
    start(scheduler, "a", list(range(30)), save_positions=(9,))
    for _ in range(3):
        simulator.step(lambda _: 1)
    simulator.step(lambda _: 2)
    scheduler.abort(["a"])
    for _ in range(3):  # nothing is launched: the copy waits, and its destination with it
        assert not simulator.step(lambda _: 1)
        assert sum(simulator.pools()[-1].refs) == 1
    start(scheduler, "b", [*range(30), 1, 1, 1, 2, 3])
    output = scheduler.schedule(now=0.0)
    [(slot, state_id)], [(source, destination)] = output.copies.saves, output.copies.states
    [chunk] = output.chunks
    assert (chunk.start, source) == (33, state_id)
    assert destination == chunk.sequence.state_id
    assert simulator.saved.get(state_id) is None
    assert simulator.slots[slot] is not None
    simulator.copy(output.copies)
    simulator.run(chunk, lambda _: 4)
    scheduler.advance(output)
    assert sum(simulator.pools()[-1].refs) == 0


def test_where_every_compressed_slot_waits_for_a_copy_nothing_more_is_kept() -> None:
    scheduler, simulator = fresh(block_size=4, num_slots=9, num_compressed=1 + 2, max_num_seqs=4)
    for i in range(4):
        start(scheduler, str(i), [10 * i] * 7)
    simulator.step(lambda _: 1)
    scheduler.abort(map(str, range(4)))
    assert scheduler.stats.saved_states == 2
    assert sum(simulator.pools()[-1].refs) == 2
    start(scheduler, "next", [3])
    simulator.step(lambda _: 1)
    scheduler.abort(["next"])
    simulator.finish()
    assert simulator.num_saved == 2  # the newest and one of those two


def test_states_pass_through_the_slots_that_are_free_the_best_first() -> None:
    boundaries = (8, 16, 24)
    for staging, expected in ((1, [8]), (2, [8, 16]), (9, [4, 8, 12, 16, 20, 24, 28])):
        scheduler, simulator = fresh(
            block_size=4, interval=4, num_slots=1 + 1 + staging, num_compressed=20, max_num_seqs=1
        )
        start(scheduler, "a", list(range(30)), save_positions=boundaries)
        output = scheduler.schedule(now=0.0)
        [chunk] = output.chunks
        assert [save.position for save in chunk.saves] == expected
        assert len({chunk.sequence.state_id, *(save.slot for save in chunk.saves)}) == 1 + len(expected)
        result = simulator.run(chunk, lambda _: 1)
        scheduler.advance(output)
        scheduler.update(output, [result])
        assert scheduler.stats.state_slots_used == 1
        assert scheduler.stats.saved_states == len(expected)
        simulator.step(lambda _: 1)
        scheduler.abort(["a"])
        simulator.finish()
        assert simulator.num_saved == len(expected) + 1
