"""The limit of bytes that arrive at the same time."""

from __future__ import annotations

import asyncio

import pytest

from jamba_server.server.http.prefill.in_flight import BytesInFlight


async def test_at_most_the_limit_arrives_in_the_order_of_arrival() -> None:
    flight, order, doors = BytesInFlight(10), list[str](), {name: asyncio.Event() for name in "abcd"}

    async def take(name: str, size: int) -> None:
        async with flight.taken(size):
            order.append(name)
            assert flight.total <= 10
            await doors[name].wait()

    tasks = {name: asyncio.create_task(take(name, size)) for name, size in zip("abcd", (6, 4, 5, 1), strict=True)}
    await asyncio.sleep(0.01)
    assert (order, flight.total) == (["a", "b"], 10)
    doors["b"].set()
    await asyncio.sleep(0.01)
    assert (order, flight.total) == (["a", "b"], 6), "the small one does not overtake the large one"
    tasks["c"].cancel()
    await asyncio.sleep(0.01)
    assert (order, flight.total) == (["a", "b", "d"], 7)
    tasks["a"].cancel()
    doors["d"].set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert flight.total == 0


async def test_who_is_cancelled_before_its_turn_takes_nothing() -> None:
    flight = BytesInFlight(1)
    async with flight.taken(1):
        waiting = asyncio.create_task(flight.taken(1).__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert flight.total == 0
    async with flight.taken(1):
        assert flight.total == 1
