"""Reads the file of a session from the body of a request. Segments go to the folder of the disk tier as they arrive, so
that at most one of them is in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request

from jamba_server.engine.disk_tier.folder import LONGEST_HEADER
from jamba_server.engine.disk_tier.format import BadSegment
from jamba_server.engine.disk_tier.transfer import Arrivals
from jamba_server.server.http.files.upload import IDLE_SECONDS, LEAST_RATE
from jamba_server.server.http.limits.bodies import BodyShare
from jamba_server.server.http.schemas.sessions import SESSION_FILE
from jamba_server.server.http.session_files.format import (
    PREFIX_BYTES,
    Contents,
    bad_file,
    header_length,
    unpacked,
)

logger = logging.getLogger(__name__)


class Intake:
    """The body of a request, in pieces of the wanted sizes.

    Raises RequestRejected if the body ends too early, HTTPException for a body of another media type, and for one that
    stops or is very slow after the first `patience` seconds, and ClientDisconnect if the connection breaks.
    """

    def __init__(self, request: Request, *, patience: float) -> None:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send a form without asking the server first, but not this media type.
        if media_type != SESSION_FILE:
            raise HTTPException(415, f"Content-Type is {media_type[:64]!r}; it must be {SESSION_FILE}.")
        self._chunks, self._rest, self._patience = aiter(request.stream()), b"", patience
        self._num_bytes, self._start = 0, asyncio.get_running_loop().time()

    async def header(self, share: BodyShare, *, limit: int) -> Contents:
        """Reads the header of the file. Its bytes are counted in `share`."""
        prefix = await self._whole(PREFIX_BYTES)
        length = header_length(prefix, limit=limit)
        share.grow(length)
        header = await self._whole(length)
        return await anyio.to_thread.run_sync(unpacked, prefix, header)

    async def segments(
        self, sizes: Sequence[int], arrivals: Arrivals, one_at_a_time: anyio.CapacityLimiter, *, max_tokens: int
    ) -> int | None:
        """Reads the segments and hands them to `arrivals`, one at a time for all requests (`one_at_a_time`). Returns
        how many of them the folder did not have yet, or None if they could not be written. A segment has at most
        `max_tokens` tokens."""
        largest = arrivals.folder.layout.num_bytes(0, max_tokens) + LONGEST_HEADER
        end = self._position + sum(sizes)
        for number, size in enumerate(sizes):
            if size > largest:
                raise bad_file(f"segment {number} has {size} bytes; one of this model has at most {largest}")
            path = arrivals.folder.unfinished(bytes(32))
            try:
                await self._into(path, size)
                await anyio.to_thread.run_sync(arrivals.take, path, limiter=one_at_a_time)
            except BadSegment as error:
                raise bad_file(f"segment {number} cannot be used: {error}") from None
            except OSError as error:
                logger.error("the segments of an imported session cannot be written: %s", error)
                await self.skip(end - self._position)
                return None
            finally:
                with contextlib.suppress(OSError):
                    await anyio.to_thread.run_sync(path.unlink)
        return arrivals.num_written

    @property
    def _position(self) -> int:
        """The number of bytes that were taken from the body."""
        return self._num_bytes - len(self._rest)

    async def end(self) -> None:
        """Raises RequestRejected if there is more."""
        if self._rest or await self._next():
            raise bad_file("it goes on after its end")

    async def skip(self, size: int) -> None:
        async for _ in self._pieces(size):
            pass

    async def _whole(self, size: int) -> bytes:
        return b"".join([piece async for piece in self._pieces(size)])

    async def _into(self, path: Path, size: int) -> None:
        file = await anyio.to_thread.run_sync(lambda: path.open("xb"))
        with file:
            async for piece in self._pieces(size):
                await anyio.to_thread.run_sync(file.write, piece)

    async def _pieces(self, size: int) -> AsyncGenerator[bytes]:
        while size:
            chunk = self._rest or await self._next()
            if not chunk:
                raise bad_file(f"it ends {size} bytes too early")
            piece, self._rest = chunk[:size], chunk[size:]
            size -= len(piece)
            yield piece

    async def _next(self) -> bytes:
        """Returns the next bytes of the body, or b"" at its end."""
        if asyncio.get_running_loop().time() - self._start > self._patience + self._num_bytes / LEAST_RATE:
            raise HTTPException(408, f"The body arrives with less than {LEAST_RATE} bytes per second.")
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while True:
                    # ASGI allows empty chunks before the end of the body. They are skipped.
                    if (chunk := await anext(self._chunks, None)) is None:
                        return b""
                    if chunk:
                        self._num_bytes += len(chunk)
                        return chunk
        except TimeoutError:
            raise HTTPException(
                408, f"No more of the body arrived for {IDLE_SECONDS:g} s, and it is not complete."
            ) from None
