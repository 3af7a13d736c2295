"""Sends the events of kept streams. `KeptReply` makes a stream and sends it, and `StreamReply` sends the rest of a
stream to a client that has connected again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jamba_server.server.http.disconnect import disconnected
from jamba_server.server.http.errors import request_id_of, tenant_of
from jamba_server.server.http.streams.headers import STREAM_ID
from jamba_server.server.http.streams.kept import KEEP_ALIVE, KeptStream, Reader
from jamba_server.server.http.streams.registry import KeptStreams

logger = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"
# These headers ask caches and proxies to pass events on at once.
EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# The key, in the dictionary `extensions` of the ASGI scope, of a function that closes the connection at once.
CLOSE_CONNECTION = "jamba.close_connection"


class KeptReply(Response):
    """Runs `events`, which is an ASGI application that replies with a stream, keeps its events, and sends them to the
    client.

    For `events` it looks as if its client did not read while the memory for kept events is full, and as if its client
    disconnected when the stream is dropped. So such a request ends in the same ways as other streams. The call of this
    object lasts until the request has ended, even if the client has disconnected. Until then the request counts as
    running, for the limits of its API key and for the shutdown of the server.
    """

    def __init__(self, events: ASGIApp, streams: KeptStreams, id_: str, digest: bytes, send_timeout: float) -> None:
        """`id_` is the id of the stream, and `digest` a hash of the request's body. `send_timeout` is the number of
        seconds after which the connection of a client that does not read is closed."""
        super().__init__()
        self._events, self._streams, self._id, self._digest = events, streams, id_, digest
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        stream = self._streams.add(self._id, tenant_of(scope), path=path, digest=self._digest)
        source = _Source(stream)
        work = asyncio.ensure_future(self._events(scope, source.receive, source.send))
        begun = asyncio.ensure_future(source.begun.wait())
        try:
            await asyncio.wait((work, begun), return_when=asyncio.FIRST_COMPLETED)
            if source.begun.is_set():
                await StreamReply(stream, self._streams, 0, self._send_timeout)(scope, receive, send)
            await work
        finally:
            begun.cancel()
            work.cancel()
            await asyncio.gather(work, begun, return_exceptions=True)
            if not stream.complete:
                self._streams.drop(stream)


class _Source:
    """The functions `receive` and `send` of an ASGI application whose reply is kept. The event `begun` is set when the
    application begins its reply."""

    def __init__(self, stream: KeptStream) -> None:
        self._stream = stream
        self.begun = asyncio.Event()

    async def receive(self) -> Message:
        await self._stream.dropped.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun.set()
            return
        if (body := message["body"]) == KEEP_ALIVE:
            self._stream.ping()
        elif body:
            await self._stream.add(body)
        if not message["more_body"]:
            self._stream.end()


class StreamReply(Response):
    """Sends the events of a kept stream from the event `start` on. If another connection reads this stream, the server
    closes that connection."""

    media_type = EVENT_STREAM

    def __init__(self, stream: KeptStream, streams: KeptStreams, start: int, send_timeout: float) -> None:
        super().__init__(headers={**EVENT_STREAM_HEADERS, STREAM_ID: stream.id})
        del self.headers["content-length"]
        self._stream, self._streams, self._start, self._send_timeout = stream, streams, start, send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = self._streams.attach(self._stream, self._start)
        gone = asyncio.ensure_future(disconnected(receive))
        stopped = asyncio.ensure_future(reader.stopped.wait())
        sending = asyncio.ensure_future(self._send(reader, send))
        tasks = (gone, stopped, sending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            seconds, request_id = self._send_timeout, request_id_of(scope)
            logger.warning("request_id=%s the client has not read for %g s (--send-timeout)", request_id, seconds)
        finally:
            for task in (stopped, sending):
                task.cancel()
            await asyncio.gather(stopped, sending, return_exceptions=True)
            self._streams.detach(self._stream, reader)
            if not reader.finished:
                await _close(scope, gone)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _send(self, reader: Reader, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout):
                await send(message)

        await send_in_time({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (event := await reader.next()) is not None:
            await send_in_time({"type": "http.response.body", "body": event, "more_body": True})
        await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
        reader.finished = True


async def _close(scope: Scope, gone: asyncio.Future[None]) -> None:
    """Closes the connection of a reply that is not complete, if the HTTP server offers a function for that. `gone` is
    done when the connection is closed."""
    close = cast("dict[str, Callable[[], None]]", scope.get("extensions", {})).get(CLOSE_CONNECTION)
    if close is not None:
        close()
        await asyncio.wait((gone,))
