"""Requests in the background run in slots, pages and steps that no other request needs."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest

from jamba_server.engine.types import BACKGROUND_PRIORITY, Request, SamplingParams
from tests.engine.simulator import Simulator, make_scheduler

BUDGET = 32
ROOM: dict[str, Any] = {"num_pages": 4096, "max_model_len": 4000, "num_slots": 64, "max_num_batched_tokens": BUDGET}


def request(name: str, length: int = 4, max_tokens: int = 100, *, background: bool = True, **fields: Any) -> Request:
    """Prompts have nothing in common, so that none is found in the cache."""
    prompt = [Random(name).randrange(1000) for _ in range(length)]
    priority = BACKGROUND_PRIORITY if background else 0
    return Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=max_tokens), priority=priority, **fields)


class Run(Simulator):
    def __init__(self, **sizes: Any) -> None:
        settings: dict[str, Any] = {"max_num_seqs": 4, **ROOM, **sizes}
        super().__init__(make_scheduler(**settings))

    def add(self, *requests: Request) -> None:
        self.scheduler.add(requests, now=self.time)

    def updated(self) -> set[str]:
        """Runs one step; returns the ids of the requests that got a token."""
        return {update.request_id for update in self.step(lambda _: 7) if update.token_ids}

    @property
    def running(self) -> set[str]:
        return {seq.request.id for seq in self.scheduler.running}


@pytest.mark.parametrize("tenant", ["", "another"])
@pytest.mark.parametrize("num_live", [1, 3])
def test_a_new_request_takes_slots_of_the_background_at_once_and_its_prompt_runs_alone(
    num_live: int, tenant: str
) -> None:
    run = Run()
    run.add(*(request(f"b{i}") for i in range(6)))
    assert run.updated() == {"b0", "b1", "b2", "b3"}
    live = {f"live{i}" for i in range(num_live)}
    run.add(*(request(name, background=False, max_tokens=3, tenant=tenant) for name in live))
    assert run.updated() == live
    assert len(run.running) == 4
    stats = run.scheduler.stats
    assert (stats.num_running, stats.num_waiting) == (4, 0)
    assert (stats.num_background_running, stats.num_background_waiting) == (4 - num_live, 2 + num_live)
    assert run.updated() == run.running, "while replies are decoded, the background has the other slots"
    run.updated()
    for _ in range(3):
        run.updated()
    assert len(run.running) == 4, "idle slots are used again"
    assert run.scheduler.stats.num_background_running == 4


def test_many_choices_of_one_request_take_all_slots() -> None:
    run = Run()
    run.add(*(request(f"b{i}") for i in range(4)))
    run.updated()
    run.add(*(request(f"live{i}", background=False, parent="one") for i in range(4)))
    assert run.updated() == run.running == {f"live{i}" for i in range(4)}


def test_the_background_starts_nothing_while_a_long_prompt_runs_and_everything_afterwards() -> None:
    run = Run()
    run.add(request("live", 4 * BUDGET, 2, background=False), request("b", 4))
    for _ in range(3):
        assert run.updated() == set()
        assert run.running == {"live"}
    assert run.updated() == {"live"}
    assert run.updated() == {"live", "b"}


def test_while_others_reply_the_background_computes_short_pieces_of_prompts() -> None:
    run = Run()
    run.add(request("live", 4, 100, background=False))
    run.updated()
    run.add(request("b", BUDGET))
    for _ in range(3):
        assert run.updated() == {"live"}
    assert run.updated() == {"live", "b"}, "a quarter of the prompt was computed in each step"


def test_long_prompts_of_the_background_do_not_hold_up_others() -> None:
    run = Run()
    run.add(*(request(f"b{i}", 900) for i in range(3)))
    run.updated()
    run.add(*(request(f"live{i}", 2 * BUDGET, 1, background=False) for i in range(2)))
    for _ in range(4):
        assert not run.updated() & {"b0", "b1", "b2"}
    assert not run.running & {"live0", "live1"}, "both have ended"


def test_the_background_gives_its_pages_back_until_a_new_prompt_fits() -> None:
    run = Run(num_pages=40, max_model_len=150, max_num_batched_tokens=128)
    run.add(*(request(f"b{i}", 30) for i in range(4)))
    run.updated()
    run.add(request("live", 100, 30, background=False))
    assert run.updated() == {"live"}
    ended: list[str] = []
    while run.scheduler.has_work:
        ended += [update.request_id for update in run.step(lambda _: 7) if update.finish_reason]
    assert sorted(ended) == ["b0", "b1", "b2", "b3", "live"]
    run.finish()


def test_a_request_that_waits_for_pages_of_others_does_not_make_the_background_start_and_stop() -> None:
    run = Run(num_pages=40, max_model_len=150, max_num_batched_tokens=128)
    run.add(request("first", 110, 30, background=False))
    run.updated()
    run.add(request("b", 12), request("second", 100, 5, background=False))
    history: list[bool] = []
    for _ in range(10):
        run.updated()
        history.append("b" in run.running)
    assert sum(a != b for a, b in pairwise(history)) <= 1
    assert run.scheduler.stats.num_preemptions_total == 0, "only other sequences are counted"
    while run.scheduler.has_work:
        run.updated()
    run.finish()
