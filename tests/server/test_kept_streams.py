"""The events of streams that are kept for clients that reconnect, and their limits."""

from __future__ import annotations

import asyncio

import pytest

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.server.http.errors import EventsDropped, RateLimited, StreamNotFound
from jamba_server.server.http.streams.kept import EVENT_BYTES, KEEP_ALIVE, KeptStream, Reader
from jamba_server.server.http.streams.registry import KeptStreams

EVENT = b"data: x\n\n"
SIZE = EVENT_BYTES + len(b"id: s:0\n" + EVENT)


def stream_of(max_events: int) -> KeptStream:
    return KeptStream("s", "", path="/", digest=b"", max_bytes=max_events * SIZE)


async def read(reader: Reader, number: int) -> list[bytes | None]:
    return [await reader.next() for _ in range(number)]


async def is_blocked(task: asyncio.Task[None]) -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_events_are_numbered_from_zero() -> None:
    stream = stream_of(10)
    await stream.add(EVENT)
    await stream.add(b"event: e\n" + EVENT)
    stream.end()
    assert await read(stream.attach(0), 3) == [b"id: s:0\n" + EVENT, b"id: s:1\nevent: e\n" + EVENT, None]
    assert await read(stream.attach(1), 2) == [b"id: s:1\nevent: e\n" + EVENT, None]
    assert stream.all_read


async def test_new_events_wait_while_nobody_reads() -> None:
    stream = stream_of(4)
    for _ in range(4):
        await stream.add(EVENT)
    adding = asyncio.create_task(stream.add(EVENT))
    assert await is_blocked(adding)
    assert stream.size == 4 * SIZE
    reader = stream.attach(0)
    await read(reader, 2)  # half of the memory is for events that were read
    assert await is_blocked(adding)
    await read(reader, 1)
    await adding
    assert (stream.size, stream.num_events) == (4 * SIZE, 5)


async def test_the_latest_events_can_be_read_again() -> None:
    stream = stream_of(4)
    reader = stream.attach(0)
    for _ in range(20):
        await stream.add(EVENT)
        await reader.next()
    assert await read(stream.attach(19), 1) == [b"id: s:19\n" + EVENT]
    with pytest.raises(EventsDropped, match=r"before number 19 .* continue at event 18"):
        stream.attach(18)
    with pytest.raises(RequestRejected, match="20 events up to now"):
        stream.attach(21)
    for _ in range(2):  # what was not lost leaves room for new events
        await asyncio.wait_for(stream.add(EVENT), 10)


async def test_a_reader_waits_and_is_kept_awake() -> None:
    stream = stream_of(4)
    reader = stream.attach(0)
    waiting = asyncio.create_task(read(reader, 2))
    await asyncio.sleep(0)
    stream.ping()
    await asyncio.sleep(0)
    await stream.add(EVENT)
    assert await waiting == [KEEP_ALIVE, b"id: s:0\n" + EVENT]


async def test_a_second_reader_stops_the_first() -> None:
    stream = stream_of(4)
    first = stream.attach(0)
    second = stream.attach(0)
    assert first.stopped.is_set()
    stream.drop()
    assert second.stopped.is_set()
    assert stream.size == 0


# All streams together -------------------------------------------------------------------------------------------------


def kept(*, max_streams: int, resume_timeout: float = 60.0) -> KeptStreams:
    return KeptStreams(max_streams=max_streams, max_bytes=1000, resume_timeout=resume_timeout)


def add(streams: KeptStreams, id_: str, owner: str = "") -> KeptStream:
    return streams.add(id_, owner, path="/", digest=b"")


async def read_to_the_end(streams: KeptStreams, stream: KeptStream) -> None:
    await stream.add(EVENT)
    stream.end()
    reader = streams.attach(stream, 0)
    await read(reader, 2)
    streams.detach(stream, reader)


async def test_streams_that_were_read_make_room() -> None:
    streams = kept(max_streams=2)
    one, two = add(streams, "one"), add(streams, "two")
    with pytest.raises(Overloaded, match=r"2 streams .* the limit \(--max-kept-streams\) is 2"):
        add(streams, "three")
    await two.add(EVENT)
    two.end()  # but nobody has read it
    with pytest.raises(Overloaded):
        add(streams, "three")
    await read_to_the_end(streams, one)
    add(streams, "three")
    assert one.dropped.is_set()
    with pytest.raises(StreamNotFound):
        streams.find("one", "")
    streams.close()
    assert (len(streams), two.dropped.is_set(), streams.num_expired) == (0, True, 0)


async def test_one_key_gets_a_quarter() -> None:
    streams = kept(max_streams=8)
    mine = [add(streams, f"a{i}", "a") for i in range(2)]
    with pytest.raises(RateLimited, match="2 streams of this API key"):
        add(streams, "a2", "a")
    add(streams, "b0", "b")
    await read_to_the_end(streams, mine[0])
    add(streams, "a2", "a")
    with pytest.raises(StreamNotFound):
        streams.find("a2", "b")
    streams.close()


async def test_a_stream_without_a_reader_expires() -> None:
    streams = kept(max_streams=2, resume_timeout=0.02)
    read, unread, busy = add(streams, "read"), None, None
    await read_to_the_end(streams, read)
    unread = add(streams, "unread")
    streams.detach(unread, streams.attach(unread, 0))
    await asyncio.wait_for(read.dropped.wait(), 10)
    await asyncio.wait_for(unread.dropped.wait(), 10)
    assert (len(streams), streams.num_expired) == (0, 1)
    busy = add(streams, "busy")
    streams.detach(busy, streams.attach(busy, 0))
    reader = streams.attach(busy, 0)  # back in time
    await asyncio.sleep(0.04)
    assert streams.find("busy", "") is busy
    assert streams.num_resumed == 1
    streams.detach(busy, reader)
    streams.close()


async def test_no_streams_are_kept() -> None:
    with pytest.raises(RequestRejected, match="--max-kept-streams"):
        add(kept(max_streams=0), "one")
