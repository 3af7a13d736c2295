"""Pinned prefixes stay while others are evicted, and end by the clock of the inbox."""

from __future__ import annotations

import pytest

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.pins import Pins
from jamba_server.engine.core import Inbox
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import CacheUse, Request, SamplingParams, TokenUpdate
from tests.engine.simulator import Simulator, make_scheduler

PIN = CacheUse(pin_seconds=60.0)


def run(scheduler: Scheduler, simulator: Simulator, name: str, prompt: list[int], cache: CacheUse) -> list[TokenUpdate]:
    scheduler.add([Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=2), cache=cache)], now=0.0)
    updates: list[TokenUpdate] = []
    while scheduler.has_work:
        updates += simulator.step(lambda _: 1)
    return updates


@pytest.mark.parametrize("num_compressed", [0, 9])
def test_a_pinned_prefix_survives_others(num_compressed: int) -> None:
    for cache, expected in ((CacheUse(), 0), (PIN, 28)):
        scheduler = make_scheduler(num_pages=26, block_size=4, num_slots=9, num_compressed=num_compressed)
        simulator = Simulator(scheduler)
        updates = run(scheduler, simulator, "pinned", list(range(30)), cache)
        assert updates[-1].num_pinned == (31 if cache is PIN else None)
        for i in range(20):
            run(scheduler, simulator, f"r{i}", [100 + i] * 50, CacheUse())
        again = run(scheduler, simulator, "again", [*range(30)], CacheUse())
        assert again[0].num_cached == expected
        assert again[-1].token_ids == [1]
        for name, _ in scheduler.cache.pins.take_new():
            scheduler.cache.pins.release(name)
        assert scheduler.stats.pinned_blocks == scheduler.stats.pinned_states == 0


def test_running_requests_take_what_is_pinned() -> None:
    scheduler = make_scheduler(num_pages=26, block_size=4)
    simulator = Simulator(scheduler)
    run(scheduler, simulator, "pinned", list(range(30)), PIN)
    assert run(scheduler, simulator, "large", [7] * 90, CacheUse())[-1].finish_reason == "length"
    assert run(scheduler, simulator, "again", [*range(30)], CacheUse())[0].num_cached == 0


def test_pins_have_a_share_of_the_memory() -> None:
    scheduler = make_scheduler(num_pages=26, block_size=4)
    simulator = Simulator(scheduler)
    assert run(scheduler, simulator, "large", list(range(60)), PIN)[-1].num_pinned == 0
    assert run(scheduler, simulator, "first", list(range(200, 230)), PIN)[-1].num_pinned == 31
    assert run(scheduler, simulator, "second", list(range(100, 130)), PIN)[-1].num_pinned == 0
    assert run(scheduler, simulator, "same", list(range(200, 230)), PIN)[-1].num_pinned == 31
    assert [name for name, _ in scheduler.cache.pins.take_new()] == ["first", "same"]


def test_a_pin_ends_by_its_name() -> None:
    pages, states = BlockPool(9), BlockPool(9)
    pins = Pins(pages, states)
    assert pins.add("a", [b"1", b"2"], [b"2"], 1.0)
    assert pins.add("b", [b"1"], [], 1.0)
    pins.release("a")
    assert (pages.num_pinned, states.num_pinned) == (1, 0)
    pins.release("a")
    pins.release("b")
    assert pages.num_pinned == 0


def test_the_inbox_tells_which_pins_have_ended() -> None:
    now = 100.0
    inbox = Inbox(clock=lambda: now)
    inbox.pinned([("short", 1.0), ("long", 5.0)])
    assert inbox.ended_pins() == []
    now = 101.0
    assert inbox.ended_pins() == ["short"]
    now = 200.0
    assert inbox.ended_pins() == ["long"]
    assert inbox.ended_pins() == []


def test_an_evicted_block_without_a_pin_goes_before_a_pinned_one() -> None:
    pool = BlockPool(4)
    ids = pool.allocate(3) or []
    for i, key in zip(ids, (b"a", b"b", b"c"), strict=True):
        pool.publish(i, key)
    pool.pin([b"a", b"b"])
    pool.release(ids)
    assert pool.allocate(2, evict_pinned=False) is None
    pool.allocate(1)
    assert pool.evicted[0][1] == b"c"
    pool.unpin([b"b"])
    pool.allocate(1)
    assert pool.evicted[0][1] == b"b"
    pool.allocate(1)
    assert pool.evicted[0][1] == b"a"
