"""Fairness: no request waits for a long prompt or many choices, none starves, and the order is the same in every
run."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from jamba_server.engine.fairness import AGEING, MAX_LONG_PREFILLS, RESERVED_PART
from jamba_server.engine.scheduler import Scheduler, SchedulerOutput
from jamba_server.engine.types import Request, SamplingParams
from tests.engine.simulator import Simulator, make_scheduler

BUDGET = 32
ROOM: dict[str, Any] = {"num_pages": 4096, "max_model_len": 4000, "num_slots": 64, "max_num_batched_tokens": BUDGET}


def request(name: str, length: int, max_tokens: int = 2, **fields: Any) -> Request:
    """Prompts have nothing in common, so that none is found in the cache."""
    prompt = [Random(name).randrange(1000) for _ in range(length)]
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens), **fields)


def step(simulator: Simulator) -> set[str]:
    """Runs one step; returns the ids of the requests whose first token it brought."""
    return {update.request_id for update in simulator.step(lambda _: 7) if update.queue_seconds is not None}


def steps_until(simulator: Simulator, name: str) -> int:
    """Returns the number of steps until the first token of a request."""
    for number in range(1, 10_000):
        if name in step(simulator):
            return number
    raise AssertionError(f"{name} starved")


def prompt_tokens(output: SchedulerOutput) -> dict[str, int]:
    return {c.sequence.request.id: c.end - c.start for c in output.chunks if c.end - c.start > 1}


@pytest.mark.parametrize("num_long", [1, 4])
def test_a_short_prompt_does_not_wait_for_long_ones(num_long: int) -> None:
    scheduler = make_scheduler(max_num_seqs=8, **ROOM)
    simulator = Simulator(scheduler)
    scheduler.add([request(f"long{i}", 3000) for i in range(num_long)], now=0.0)
    for _ in range(5):
        step(simulator)
    scheduler.add([request("short", BUDGET // RESERVED_PART)], now=0.0)
    assert step(simulator) == {"short"}


LONGER = 4 * BUDGET
LONGER_ALONE: dict[str, Any] = {"max_num_seqs": 8, **ROOM, "max_num_batched_tokens": LONGER}


def costs(simulator: Simulator) -> dict[str, int]:
    """Runs one step, and returns the number of prompt tokens of each prompt in it."""
    outputs, schedule = list[SchedulerOutput](), simulator.scheduler.schedule
    simulator.scheduler.schedule = lambda *, now: outputs.append(schedule(now=now)) or outputs[0]
    simulator.step(lambda _: 7)
    simulator.scheduler.schedule = schedule
    return prompt_tokens(outputs[0])


def test_a_step_without_replies_is_larger() -> None:
    """Nobody waits for it: there is no reply, and no prompt gets its first token from a smaller step."""
    scheduler = make_scheduler(max_num_mixed_tokens=BUDGET, **LONGER_ALONE)
    scheduler.add([request("long", 1000), request("longer", 2000)], now=0.0)
    assert costs(Simulator(scheduler)) == {"long": LONGER - LONGER // RESERVED_PART, "longer": LONGER // RESERVED_PART}


def test_beside_a_reply_a_step_has_its_usual_size() -> None:
    scheduler = make_scheduler(max_num_mixed_tokens=BUDGET, **LONGER_ALONE)
    simulator = Simulator(scheduler)
    scheduler.add([request("short", 5, max_tokens=3)], now=0.0)
    assert costs(simulator) == {"short": 5}
    scheduler.add([request("long", 1000)], now=0.0)
    assert [costs(simulator), costs(simulator), costs(simulator)] == [{"long": n} for n in (BUDGET, BUDGET, LONGER)]


def test_a_prompt_that_ends_in_a_step_waits_for_no_other_prompt() -> None:
    """A short prompt shares a step of the usual size. One that fits into a larger step has it alone."""
    scheduler = make_scheduler(max_num_mixed_tokens=BUDGET, **LONGER_ALONE)
    simulator = Simulator(scheduler)
    scheduler.add([request("long", 1000), request("short", 5, max_tokens=1)], now=0.0)
    assert costs(simulator) == {"short": 5, "long": BUDGET - 5}
    scheduler.add([request("other", BUDGET + 10, max_tokens=1)], now=0.0)
    assert costs(simulator) == {"other": BUDGET + 10}
    assert costs(simulator) == {"long": LONGER}


def test_a_long_prompt_ahead_gets_less_when_another_one_ends_in_the_step() -> None:
    """A priority puts the long prompt first. It leaves room to the short one, which then does not wait for it."""
    scheduler = make_scheduler(max_num_mixed_tokens=BUDGET, **LONGER_ALONE)
    scheduler.add([request("long", 1000, priority=-1), request("short", 20, max_tokens=1)], now=0.0)
    assert costs(Simulator(scheduler)) == {"long": BUDGET - 20, "short": 20}


def test_a_long_prompt_alone_has_the_whole_step_and_beside_short_ones_what_they_leave() -> None:
    scheduler = make_scheduler(max_num_seqs=8, **ROOM)
    scheduler.add([request("long", 3000)], now=0.0)
    assert prompt_tokens(scheduler.schedule(now=0.0)) == {"long": BUDGET}
    scheduler = make_scheduler(max_num_seqs=8, **ROOM)
    scheduler.add([request("long", 3000), request("short", 5)], now=0.0)
    assert prompt_tokens(scheduler.schedule(now=0.0)) == {"short": 5, "long": BUDGET - 5}


def test_only_a_few_long_prompts_hold_pages_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=8, **ROOM)
    simulator = Simulator(scheduler)
    scheduler.add([request(f"long{i}", 900) for i in range(6)], now=0.0)
    firsts: list[str] = []
    while scheduler.has_work:
        firsts += step(simulator)
        in_prefill = [seq for seq in scheduler.running if seq.num_computed and seq.num_remaining > BUDGET]
        assert len(in_prefill) <= MAX_LONG_PREFILLS
    assert firsts == [f"long{i}" for i in range(6)], "equal prompts end in the order of their arrival"


def test_a_flood_of_short_prompts_does_not_starve_a_long_one() -> None:
    """It is overtaken by AGEING times its length at most."""
    scheduler = make_scheduler(max_num_seqs=8, **ROOM)
    simulator = Simulator(scheduler)
    scheduler.add([request("long", 300)], now=0.0)
    for number in range(10_000):
        scheduler.add([request(f"short{number}-{i}", BUDGET // 2, 1) for i in range(2)], now=0.0)
        if "long" in step(simulator):
            assert 20 < number <= 300 * AGEING // BUDGET + 300 // (BUDGET - BUDGET // RESERVED_PART) + 2
            return
    raise AssertionError("the long prompt starved")


def test_ageing_never_lifts_background_work_above_live_work() -> None:
    scheduler = make_scheduler(max_num_seqs=8, caching=False, **ROOM)
    simulator = Simulator(scheduler)
    scheduler.add([request("background", 20, priority=10)], now=0.0)
    for number in range(300):
        scheduler.add([request(f"live{number}", BUDGET, 1)], now=0.0)
        assert step(simulator) == {f"live{number}"}
    assert steps_until(simulator, "background") == 1


@pytest.mark.parametrize("field", ["parent", "tenant"])
def test_one_that_holds_all_slots_gives_one_back(field: str) -> None:
    """A request with many choices, or a key with many requests; the parked choice goes on where it was."""
    scheduler = make_scheduler(max_num_seqs=4, **ROOM)
    simulator = Simulator(scheduler)
    many = [request(f"many{i}", 8, 30, **{field: "many"}) for i in range(8)]
    scheduler.add(many, now=0.0)
    for _ in range(5):
        step(simulator)
    assert len(scheduler.running) == 4
    scheduler.add([request("one", 8, 3)], now=0.0)
    assert step(simulator) == {"one"}
    assert next(iter(scheduler.waiting)).request.id == "many3", "the youngest of the four was parked"
    while scheduler.has_work:
        step(simulator)
    assert all(len(tokens) == 8 + 29 for seq, tokens in simulator.texts.items() if seq.request.id != "one")


def test_admissions_take_turns_among_requests_and_keys() -> None:
    scheduler = make_scheduler(max_num_seqs=6, **ROOM)
    crowd = [request(f"a{i}", 4, 9, tenant="a", parent="a") for i in range(9)]
    scheduler.add([*crowd, request("b0", 4, 9, tenant="b"), request("b1", 4, 9, tenant="b")], now=0.0)
    scheduler.schedule(now=0.0)
    assert sorted(seq.request.id for seq in scheduler.running) == ["a0", "a1", "a2", "a3", "b0", "b1"]


@pytest.mark.parametrize("ahead", [False, True])
def test_everybody_ends_and_the_order_is_the_same_every_time(ahead: bool) -> None:
    """Random prompts, choices, keys and priorities, few pages: nobody starves, and a second run decides alike."""

    def run(seed: int) -> list[object]:
        random = Random(seed)
        scheduler: Scheduler = make_scheduler(
            num_pages=random.randint(60, 200), max_model_len=220, max_num_seqs=random.randint(1, 6), num_slots=9
        )
        simulator, taken = Simulator(scheduler, ahead=ahead), list[object]()
        requests = [
            request(
                f"r{i}",
                random.choice((3, 9, 40, 200)),
                random.randint(1, 9),
                parent=random.choice(("", "p", "q")),
                tenant=random.choice("ab"),
                priority=random.choice((0, 0, 5)),
            )
            for i in range(30)
        ]
        while requests or scheduler.has_work or simulator.under_way:
            assert simulator.time < 5_000, "somebody starves"
            if requests and random.random() < 0.3:
                scheduler.add([requests.pop()], now=simulator.time)
            taken.append(sorted(update.request_id for update in simulator.step(lambda _: 7)))
        return taken

    for seed in range(4):
        assert run(seed) == run(seed)
