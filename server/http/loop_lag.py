"""Measures how late the event loop runs its tasks. Code that blocks the loop delays every request and every stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_SECONDS = 0.25


async def measure_lag(record: Callable[[float], None], *, interval: float = INTERVAL_SECONDS) -> None:
    """Calls `record` every `interval` seconds with the number of seconds by which this task woke up too late.

    Runs until its task is cancelled.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval
        await asyncio.sleep(interval)
        record(max(0.0, loop.time() - due))
