"""Whether the server takes new work, and where work waits that comes before the engine has loaded."""

from __future__ import annotations

import asyncio

from jamba_server.engine.errors import EngineLoading, Overloaded
from jamba_server.engine.process.client import Engine

RETRY_AFTER_SECONDS = 5  # by then another replica has the traffic, or this one is back


class Lifecycle:
    """Accepting until `drain`. From then on new work is refused, while what runs goes on to its end."""

    def __init__(self) -> None:
        self._draining = False

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        self._draining = True

    def admit(self) -> None:
        """Raises Overloaded while draining."""
        if self._draining:
            raise Overloaded("The server is shutting down; send the request again.", retry_after=RETRY_AFTER_SECONDS)


class StartupQueue:
    """Requests that wait while the engine loads for the first time, each for `seconds` at most.

    `max_waiting` bounds the choices that they ask for together, as it bounds the engine's own queue; 0 for no bound.
    """

    def __init__(self, engine: Engine, *, seconds: float, max_waiting: int) -> None:
        self._engine, self._seconds, self._max_waiting = engine, seconds, max_waiting
        self._num_waiting = 0

    async def wait(self, num_choices: int) -> None:
        """Returns when the engine has loaded, or cannot be. Raises EngineLoading when that takes too long, Overloaded
        when too many wait already."""
        if self._max_waiting and self._num_waiting >= self._max_waiting:
            raise Overloaded(
                f"The engine is loading and {self._num_waiting} requests wait for it already; the limit "
                f"(--max-queue-requests) is {self._max_waiting}.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._num_waiting += num_choices
        try:
            async with asyncio.timeout(self._seconds):
                await self._engine.first_start()
        except TimeoutError:
            raise EngineLoading(self._describe()) from None
        finally:
            self._num_waiting -= num_choices

    def _describe(self) -> str:
        progress = self._engine.health.loading
        if progress is None:  # it has loaded this very moment
            return "The engine has just loaded; send the request again."
        return (
            f"The engine is loading ({progress.phase}: {progress.fraction:.0%}), and requests wait for it for "
            f"{self._seconds:g} s (--startup-wait). Send the request again later."
        )
