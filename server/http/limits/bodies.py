"""Limits the memory for the bodies of all requests together."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from jamba_server.engine.errors import Overloaded

RETRY_AFTER_SECONDS = 1


class BodyMemory:
    """Counts the bytes of the bodies of all running requests, which may be at most `limit` together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = 0

    def take(self, size: int) -> None:
        """Counts `size` more bytes. Raises Overloaded if the total would exceed the limit."""
        if self.total + size > self._limit:
            raise Overloaded(
                f"The bodies of all requests have {self.total} bytes together; the limit (--body-memory-bytes) is "
                f"{self._limit}.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self.total += size

    def give(self, size: int) -> None:
        self.total -= size


class BodyShare:
    """Counts the bytes of one request's body in a `BodyMemory`. At the end of the `with` block the bytes are subtracted
    again."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self.size = memory, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.give(self.size)

    def grow(self, size: int) -> None:
        """Counts `size` more bytes of the body. Raises Overloaded if the bodies of all requests then exceed the
        limit."""
        self._memory.take(size)
        self.size += size
