"""The class `KeptStream` keeps the latest events of one stream, so that a client can read them again.

The events of a stream are numbered from 0. One task adds events, and at most one reader at a time sends them to a
client. If the client's connection breaks, the client connects again, and a new reader continues at the event that the
client asks for.
"""

from __future__ import annotations

import asyncio
from collections import deque

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.errors import EventsDropped

KEEP_ALIVE = b": keep-alive\n\n"
EVENT_BYTES = 100  # estimated memory of one event in addition to its text, in bytes
# Events that were already sent may take 1/SENT_PART of a stream's memory while a client reads. So a client that loses
# its connection finds the latest events, and there is memory for new events until the client is back.
SENT_PART = 2


class KeptStream:
    """The latest events of one stream.

    `owner` is the name of the API key's owner, who alone may read the stream. `path` is the path of the request that
    made the stream, and `digest` a hash of the request's body. `complete` says that the last event has been added. The
    event `dropped` is set when the stream is no longer kept; then nobody will read it, so its request must be aborted.
    """

    def __init__(self, id_: str, owner: str, *, path: str, digest: bytes, max_bytes: int) -> None:
        """`max_bytes` limits the estimated size of the events in memory. One event more is accepted as long as the
        events have fewer bytes."""
        self.id, self.owner, self.path, self.digest = id_, owner, path, digest
        self.size = 0  # estimated size of the kept events, in bytes
        self.num_readers = 0  # the number of readers that the stream has had
        self.complete = False
        self.dropped = asyncio.Event()
        self.reader: Reader | None = None
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        self._first = 0  # the number of the first kept event
        self._next_unread = 0  # the number of the first event that the latest reader has not taken
        self._read_size = 0  # estimated size of the kept events that the latest reader has taken, in bytes
        self._has_room = asyncio.Event()

    @property
    def num_events(self) -> int:
        """The number of events that were added up to now, including those that are no longer kept."""
        return self._first + len(self._events)

    @property
    def all_read(self) -> bool:
        """Returns whether the stream is complete and a reader has taken its last event."""
        return self.complete and self._next_unread == self.num_events

    async def add(self, event: bytes) -> None:
        """Adds the next event. Waits while the events in memory have as many bytes as they may have."""
        while self.size >= self._max_bytes:
            self._has_room.clear()
            await self._has_room.wait()
        numbered = b"id: %s:%d\n%s" % (self.id.encode(), self.num_events, event)
        self._events.append(numbered)
        self.size += _size(numbered)
        self._notify()

    def end(self) -> None:
        """Records that the last event has been added."""
        self.complete = True
        self._notify()

    def ping(self) -> None:
        """Makes the reader send a comment that keeps the connection open, if a reader waits for the next event."""
        if self.reader is not None:
            self.reader.pinged = True
            self._notify()

    def drop(self) -> None:
        """Forgets all events and stops the reader."""
        self.dropped.set()
        if self.reader is not None:
            self.reader.stopped.set()
            self.reader = None
        self._events.clear()
        self.size = 0
        self._has_room.set()

    def attach(self, start: int) -> Reader:
        """Returns a reader that begins with the event `start`. An earlier reader is stopped.

        Raises RequestRejected if the stream does not have so many events, and EventsDropped if the event is no longer
        kept.
        """
        if start > self.num_events:
            raise RequestRejected(
                f"The stream has {self.num_events} events up to now, so it cannot continue at event {start}.",
                param="from",
            )
        if start < self._first:
            raise EventsDropped(
                f"The events before number {self._first} of the stream are no longer kept, so it cannot continue at "
                f"event {start}."
            )
        if self.reader is not None:
            self.reader.stopped.set()
        self.reader = Reader(self, start)
        self.num_readers += 1
        self._next_unread = start
        self._read_size = sum(_size(self._events[i]) for i in range(start - self._first))
        return self.reader

    def take(self, number: int) -> bytes | None:
        """Returns the event of this number for the present reader, or None if it has not been added yet. Events that
        were taken earlier are forgotten if they take too much memory."""
        if number >= self.num_events:
            return None
        event = self._events[number - self._first]
        self._next_unread = number + 1
        self._read_size += _size(event)
        while self._read_size * SENT_PART > self._max_bytes:
            size = _size(self._events.popleft())
            self._first += 1
            self.size -= size
            self._read_size -= size
        self._has_room.set()
        return event

    def _notify(self) -> None:
        if self.reader is not None:
            self.reader.news.set()


class Reader:
    """Reads the events of a kept stream for one connection, from the event `position` on.

    The event `stopped` is set when another reader has taken the place of this one, or the stream is dropped; then this
    reader must not be used any more. `finished` says that the connection has got the whole rest of the stream.
    """

    def __init__(self, stream: KeptStream, position: int) -> None:
        self._stream, self.position = stream, position
        self.news, self.stopped = asyncio.Event(), asyncio.Event()
        self.pinged = self.finished = False

    async def next(self) -> bytes | None:
        """Waits for the next event and returns it, or a comment that keeps the connection open. Returns None after the
        last event."""
        while True:
            self.news.clear()
            if (event := self._stream.take(self.position)) is not None:
                self.position += 1
                return event
            if self._stream.complete:
                return None
            if self.pinged:
                self.pinged = False
                return KEEP_ALIVE
            await self.news.wait()


def _size(event: bytes) -> int:
    return EVENT_BYTES + len(event)
