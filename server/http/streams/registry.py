"""The class `KeptStreams` holds all streams that are kept for clients whose connection may break, and limits them."""

from __future__ import annotations

import asyncio
from typing import Self

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.errors import RateLimited, StreamNotFound
from jamba_server.server.http.streams.kept import KeptStream, Reader

# The streams of one API key may be 1/KEY_PART of all kept streams, so that one key cannot take the places of others.
KEY_PART = 4
BUSY_RETRY_SECONDS = 1


class KeptStreams:
    """All streams that are kept at present, by their ids.

    A stream is dropped if `resume_timeout` seconds pass in which no client reads it. At most `max_streams` streams are
    kept, each with about `max_bytes` bytes of events. If there are too many, streams that were read to their end make
    room first.
    """

    def __init__(self, *, max_streams: int, max_bytes: int, resume_timeout: float) -> None:
        self._max_streams, self._max_bytes, self._resume_timeout = max_streams, max_bytes, resume_timeout
        self._streams: dict[str, KeptStream] = {}  # the oldest stream comes first
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.num_resumed = self.num_expired = 0

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Returns the object for the limits that a configuration asks for."""
        return cls(
            max_streams=config.max_kept_streams,
            max_bytes=config.kept_stream_bytes,
            resume_timeout=config.resume_timeout,
        )

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_bytes(self) -> int:
        """The estimated size of all kept events, in bytes."""
        return sum(stream.size for stream in self._streams.values())

    def add(self, id_: str, owner: str, *, path: str, digest: bytes) -> KeptStream:
        """Begins to keep a new stream.

        Raises RequestRejected if the server keeps no streams, RateLimited if the owner has too many, and Overloaded if
        there are too many in all.
        """
        if not self._max_streams:
            raise RequestRejected(
                "This server keeps no streams (--max-kept-streams), so X-On-Disconnect cannot be continue.",
                code="unsupported_header",
            )
        limit = max(1, self._max_streams // KEY_PART)
        owned = [stream for stream in self._streams.values() if stream.owner == owner]
        if owner and len(owned) >= limit and not self._make_room(owned):
            raise RateLimited(
                f"{len(owned)} streams of this API key are kept for clients that reconnect; the limit is {limit}.",
                kind="requests",
                retry_after=BUSY_RETRY_SECONDS,
            )
        if len(self._streams) >= self._max_streams and not self._make_room(list(self._streams.values())):
            raise Overloaded(
                f"{len(self._streams)} streams are kept for clients that reconnect; the limit (--max-kept-streams) is "
                f"{self._max_streams}.",
                retry_after=BUSY_RETRY_SECONDS,
            )
        assert id_ not in self._streams, f"stream id {id_} is taken"
        stream = self._streams[id_] = KeptStream(id_, owner, path=path, digest=digest, max_bytes=self._max_bytes)
        return stream

    def find(self, id_: str, owner: str) -> KeptStream:
        """Returns a kept stream. Raises StreamNotFound if the owner has no such stream."""
        stream = self._streams.get(id_)
        if stream is None or stream.owner != owner:
            raise StreamNotFound(
                f"No stream with the id {id_[:64]!r} is kept. A stream is kept for {self._resume_timeout:g} s after "
                "its last connection."
            )
        return stream

    def attach(self, stream: KeptStream, start: int) -> Reader:
        """Returns a reader of a kept stream, from the event `start` on. Raises what `KeptStream.attach` raises."""
        reader = stream.attach(start)
        self.num_resumed += stream.num_readers > 1
        if (timer := self._timers.pop(stream.id, None)) is not None:
            timer.cancel()
        return reader

    def detach(self, stream: KeptStream, reader: Reader) -> None:
        """Records that the connection of a reader has ended. The stream is kept for some more time, unless another
        reader has taken the place of this one."""
        if stream.reader is reader:
            stream.reader = None
            loop = asyncio.get_running_loop()
            self._timers[stream.id] = loop.call_later(self._resume_timeout, self._expire, stream)

    def drop(self, stream: KeptStream) -> None:
        """Stops to keep a stream. If its request still runs, the request is aborted."""
        if self._streams.pop(stream.id, None) is not None:
            if (timer := self._timers.pop(stream.id, None)) is not None:
                timer.cancel()
            stream.drop()

    def close(self) -> None:
        """Stops to keep all streams."""
        for stream in list(self._streams.values()):
            self.drop(stream)

    def _expire(self, stream: KeptStream) -> None:
        self.num_expired += not stream.all_read
        self.drop(stream)

    def _make_room(self, streams: list[KeptStream]) -> bool:
        """Drops the oldest of the streams that was read to its end. Returns false if there is none."""
        for stream in streams:
            if stream.all_read and stream.reader is None:
                self.drop(stream)
                return True
        return False
