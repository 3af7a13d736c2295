"""Limits the bytes that arrive at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class BytesInFlight:
    """Counts bytes that arrive, of which there are at most `limit` at the same time. `total` are those of now. Who has
    waited longest is served first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncGenerator[None]:
        """Waits until `size` more bytes may arrive, and counts them until the end of the block. `size` must not be
        larger than the limit."""
        assert size <= self.limit, "the caller checks this, because the wait would never end"
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():  # it was not served
                self._waiting = deque(each for each in self._waiting if each[1] is not turn)
            else:
                self.total -= size
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self.total + self._waiting[0][0] <= self.limit:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.total += size
                turn.set_result(None)
