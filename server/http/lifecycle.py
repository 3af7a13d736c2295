"""The class `Lifecycle` refuses new requests during a shutdown of the server.

The class `StartupQueue` lets requests wait while the engine loads.
"""

from __future__ import annotations

import asyncio

from jamba_server.engine.errors import EngineLoading, Overloaded
from jamba_server.engine.process.client import Engine

RETRY_AFTER_SECONDS = 5  # value of the header Retry-After; a restart might be over after this time


class Lifecycle:
    """Accepts new requests until `drain` is called. Requests that run at that time continue to their end."""

    def __init__(self) -> None:
        self._draining = False

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        self._draining = True

    def admit(self) -> None:
        """Raises Overloaded if the server is shutting down."""
        if self._draining:
            raise Overloaded("The server is shutting down; send the request again.", retry_after=RETRY_AFTER_SECONDS)


class StartupQueue:
    """Lets requests wait while the engine loads for the first time, each for at most `seconds` seconds.

    A request is refused if more than `max_waiting` choices would wait with it. A `max_waiting` of 0 means no limit.
    """

    def __init__(self, engine: Engine, *, seconds: float, max_waiting: int) -> None:
        self._engine, self._seconds, self._max_waiting = engine, seconds, max_waiting
        self._num_waiting = 0

    async def wait(self, num_choices: int) -> None:
        """Waits until the engine has loaded or has failed to load.

        The argument `num_choices` is the number of choices of the request that waits. Raises EngineLoading if the
        wait exceeds the class's argument `seconds`, and Overloaded if the limit `max_waiting` would be exceeded.
        """
        if self._max_waiting and self._num_waiting + num_choices > self._max_waiting:
            raise Overloaded(
                f"The engine is loading, and {self._num_waiting} choices are waiting for it; the limit "
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
        if progress is None:  # the engine finished loading after the timeout
            return "The engine has just loaded; send the request again."
        return (
            f"The engine is loading ({progress.phase}: {progress.fraction:.0%}). A request waits at most "
            f"{self._seconds:g} s for it (--startup-wait). Send the request again later."
        )
