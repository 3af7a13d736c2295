"""The search for the request that kills the engine, on an engine that is played: every step gives each of its requests
a token, unless one of them kills it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from jamba_server.engine.process.streams import LiveRequest, Stream
from jamba_server.engine.process.suspects import CLEAR_UPDATES, KILLS_PER_DEATH, TRIAL_STEPS, Suspects
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from tests.nightly import nightly

MAX_STEPS = 100_000


def live(name: str) -> LiveRequest:
    stream = Stream([name], forget=lambda ids: None, resume=lambda stream: None)
    return LiveRequest(Request(id=name, prompt=[1], params=SamplingParams()), stream)


class World:
    """A simulated engine process with requests. `killers` maps the name of a request that kills the process to the
    number of its step at which it does so. `prefill` maps a request to the number of steps before its first token.
    `kill` says whether another process kills the engine before a step. With `guarded`, the killers do not end the
    process themselves: another process kills it because of them."""

    def __init__(
        self,
        names: list[str],
        *,
        tokens: int = 40,
        killers: dict[str, int] | None = None,
        prefill: dict[str, int] | None = None,
        kill: Callable[[int], bool] = lambda step: False,
        guarded: bool = False,
    ) -> None:
        self.guarded = guarded
        self.suspects = Suspects()
        self.open = {name: live(name) for name in names}
        self.left = dict.fromkeys(names, tokens) | dict.fromkeys(killers or {}, MAX_STEPS)
        self.killers, self.prefill, self.kill = killers or {}, prefill or {}, kill
        self.failed: list[str] = []
        self.deaths = self.steps = 0
        self.ages: dict[str, int] = {}
        self.silent = dict.fromkeys(names, 0)  # steps since the request's last token
        self.longest_silence = 0

    def run(self) -> None:
        while self.open:
            self.steps += 1
            assert self.steps < MAX_STEPS, "some request is neither finished nor failed"
            self.dispatch()
            if self.kill(self.steps):
                self.die(from_outside=True)
            elif any(self.dies(name) for name in self.ages):
                self.die(from_outside=self.guarded)
            else:
                self.step()

    def dispatch(self) -> None:
        unsent = [request for request in self.open.values() if not request.sent]
        for request in self.suspects.select(unsent, idle=not self.ages):
            assert not request.sent
            request.sent = request.running = True
            self.ages[request.request.id] = 0

    def dies(self, name: str) -> bool:
        return self.killers.get(name) == self.ages[name]

    def die(self, *, from_outside: bool = False) -> None:
        self.deaths += 1
        if culprit := self.suspects.blame(self.open.values(), from_outside=from_outside):
            self.failed.append(culprit.request.id)
            del self.open[culprit.request.id]
        self.ages = {}
        for request in self.open.values():
            request.leave_engine()

    def step(self) -> None:
        for name in self.open:
            self.silent[name] += 1
        for name in list(self.ages):
            self.ages[name] += 1
            if self.ages[name] <= self.prefill.get(name, 0):
                continue
            self.open[name].take(TokenUpdate(request_id=name, token_ids=[1]))
            self.longest_silence, self.silent[name] = max(self.longest_silence, self.silent[name]), 0
            self.left[name] -= 1
            if not self.left[name]:
                self.open.pop(name).leave_engine()
                del self.ages[name]
        self.suspects.stepped()


NAMES = [f"r{i}" for i in range(32)]


@pytest.mark.parametrize("step", [0, 1, CLEAR_UPDATES - 1])
@pytest.mark.parametrize("killer", ["r0", "r17", "r31"])
def test_one_killer_among_many_is_found_and_fails_alone(killer: str, step: int) -> None:
    world = World(NAMES, killers={killer: step})
    world.run()
    assert world.failed == [killer]
    assert world.deaths <= 2 + 6, "two deaths, then the half of the suspects each time"


def test_a_killer_that_runs_alone_is_found_at_the_third_death() -> None:
    world = World(["bad"], killers={"bad": 0})
    world.run()
    assert (world.failed, world.deaths) == (["bad"], 3)


def test_several_killers_are_found() -> None:
    killers = {"r3": 0, "r4": 1, "r30": 2}
    world = World(NAMES, killers=killers)
    world.run()
    assert sorted(world.failed) == sorted(killers)


def test_a_killer_with_a_long_prompt_is_found() -> None:
    world = World(NAMES, tokens=400, killers={"r9": 3 * TRIAL_STEPS}, prefill={"r9": 10 * TRIAL_STEPS})
    world.run()
    assert world.failed == ["r9"]


def test_kills_from_outside_fail_nobody_and_hold_nobody_up() -> None:
    world = World(NAMES, tokens=400, kill=lambda step: step % 50 == 0)
    world.run()
    assert world.failed == []
    assert world.deaths >= 8
    assert world.longest_silence == 1, "each engine process had all requests from its first step on"


def test_kills_in_quick_succession_fail_nobody_and_hold_nobody_up() -> None:
    prefill = dict.fromkeys(NAMES, 4)
    world = World(NAMES, tokens=400, prefill=prefill, kill=lambda step: 50 <= step < 86 and step % 3 == 0)
    world.run()
    assert (world.failed, world.deaths) == ([], 12)
    assert world.longest_silence <= 36 + 4 + 1, "the kills themselves, and the prompts after the last of them"


def test_two_crashes_in_quick_succession_hold_requests_up_for_a_few_steps() -> None:
    world = World(NAMES, tokens=400)
    for _ in range(2):
        world.dispatch()
        world.die()
    world.run()
    assert world.failed == []
    assert world.longest_silence <= 6 * (CLEAR_UPDATES + 1), "half of the suspects at a time"


@pytest.mark.parametrize("names", [["bad"], ["good", "bad"]])
def test_a_request_for_which_another_process_kills_the_engine_is_found(names: list[str]) -> None:
    world = World(names, killers={"bad": 1}, guarded=True)
    world.run()
    assert world.failed == ["bad"]
    assert world.deaths <= 3 * KILLS_PER_DEATH


def test_a_kill_from_outside_never_fails_a_suspect() -> None:
    suspects, request = Suspects(), live("a")
    request.deaths = 3
    assert suspects.select([request], idle=True) == [request]
    request.sent = True
    assert suspects.blame([request], from_outside=True) is None
    request.sent = True
    assert suspects.blame([request], from_outside=False) is request


def test_a_request_that_comes_during_a_trial_does_not_wait_for_it() -> None:
    world = World(NAMES, tokens=400)
    for _ in range(2):
        world.dispatch()
        world.die()
    world.dispatch()
    assert len(world.ages) == len(NAMES) / 2
    world.open["new"] = live("new")
    world.left["new"], world.silent["new"] = 5, 0
    world.dispatch()
    assert "new" in world.ages


def test_a_trial_of_one_request_runs_alone_for_a_while_at_most() -> None:
    world = World(["long"], tokens=400, prefill={"long": 10**4})
    for _ in range(2):
        world.dispatch()
        world.die()
    world.open["new"] = live("new")
    world.left["new"], world.silent["new"] = 5, 0
    for _ in range(TRIAL_STEPS):
        world.dispatch()
        assert list(world.ages) == ["long"]
        world.step()
    world.dispatch()
    assert list(world.ages) == ["long", "new"]


def test_a_death_before_anything_ran_blames_nobody() -> None:
    suspects, request = Suspects(), live("waits")
    request.deaths = 2
    assert suspects.select([request], idle=True) == [request]
    request.sent = request.queued = True
    assert suspects.blame([request], from_outside=False) is None
    assert request.deaths == 2


def test_the_end_of_the_request_on_trial_ends_the_trial() -> None:
    suspects, request, other = Suspects(), live("a"), live("b")
    request.deaths = 2
    assert suspects.select([request, other], idle=True) == [request]
    request.sent = True
    assert suspects.select([other], idle=False) == []
    request.leave_engine()
    assert suspects.select([other], idle=True) == [other]


@pytest.mark.parametrize("seed", [*range(10), *nightly(range(10, 40))])
def test_whatever_happens_only_killers_fail(seed: int) -> None:
    random = Random(seed)
    names = NAMES[: random.randint(1, 32)]
    killers = {name: random.randint(0, 5) for name in names if random.random() < 0.1}
    prefill = {name: random.randint(0, 30) for name in names if name not in killers}
    world = World(names, tokens=random.randint(20, 200), killers=killers, prefill=prefill)
    world.run()
    assert sorted(world.failed) == sorted(killers)


@pytest.mark.parametrize("seed", [*range(5), *nightly(range(5, 20))])
def test_kills_from_outside_that_leave_time_for_progress_fail_nobody(seed: int) -> None:
    random = Random(seed)
    gaps = iter([random.randint(10, 200) for _ in range(100)])
    due = next(gaps)

    def kill(step: int) -> bool:
        nonlocal due
        if step < due:
            return False
        due += next(gaps, 10**9)
        return True

    world = World(NAMES, tokens=1000, kill=kill)
    world.run()
    assert world.failed == []
    assert world.deaths == 100 or not world.open
