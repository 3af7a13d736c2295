"""Sends the choices of a generation as one JSON reply or as server-sent events.

If the client disconnects, the generation is aborted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jamba_server.server.http.disconnect import disconnected
from jamba_server.server.http.errors import describe, request_id_of
from jamba_server.server.http.generation import SendTimeout
from jamba_server.server.http.services import Services
from jamba_server.server.http.streams.headers import body_digest, continues_without_client
from jamba_server.server.http.streams.kept import KEEP_ALIVE
from jamba_server.server.http.streams.reply import EVENT_STREAM, EVENT_STREAM_HEADERS, KeptReply
from jamba_server.server.http.writers.writer import Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def answer(request: Request, writer: Writer, services: Services, *, stream: bool) -> Response:
    """Returns the reply to a request.

    If `stream` is set, the generation runs later, while the reply is sent. Otherwise the generation runs to its end
    before this function returns.
    """
    config = services.config
    if continues_without_client(request.scope, stream=stream):
        events = EventStream(writer, keep_alive=config.sse_keep_alive, send_timeout=None)
        digest = body_digest(await request.body())
        return KeptReply(events, services.streams, writer.generation.spec.id, digest, config.send_timeout)
    if stream:
        return EventStream(writer, keep_alive=config.sse_keep_alive, send_timeout=config.send_timeout)
    choices = await until_disconnect(request.receive, writer.collect())
    # Many log-probabilities take long to convert to JSON, so a thread converts them.
    if any(choice.scores for choice in choices):
        body = await services.in_thread(lambda: writer.reply(choices).model_dump_json())
    else:
        body = writer.reply(choices).model_dump_json()
    return Response(body, media_type="application/json")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. If the client disconnects first, cancels `work` and raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends the events that the argument `writer` builds, each as soon as it is built.

    After every `keep_alive` seconds without an event, a comment is sent, so that proxies keep the connection open.
    The reply begins when the engine has accepted the request. An exception before the beginning becomes an ordinary
    error reply, and a later exception becomes an event of the stream. When the client disconnects, the generation is
    aborted at once, even if its choices still wait in the engine's queue.

    While the client does not read, `send` does not return, and no delta is taken from the engine's stream. Once too
    many updates wait in that stream, its requests are paused. After `send_timeout` seconds the generation is aborted
    and the connection is closed. If `send_timeout` is None, there is no such limit.
    """

    media_type = EVENT_STREAM

    def __init__(self, writer: Writer, *, keep_alive: float, send_timeout: float | None) -> None:
        super().__init__(headers=EVENT_STREAM_HEADERS)
        del self.headers["content-length"]
        self.writer = writer
        self.keep_alive, self.send_timeout = keep_alive, send_timeout
        self._started, self._last_sent = False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.send_timeout):
                    await send(message)
            except TimeoutError:
                raise SendTimeout from None

        try:
            await until_disconnect(receive, self._stream(scope, send_in_time))
        except SendTimeout:
            # The reply is not completed. The HTTP server therefore closes the connection.
            logger.warning(
                "request_id=%s the client has not read for %g s (--send-timeout)",
                request_id_of(scope),
                self.send_timeout,
            )
        except ClientDisconnect:
            if not self._started:
                raise

    async def _stream(self, scope: Scope, send: Send) -> None:
        try:
            async with self.writer.generation.run() as deltas:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._started = True
                async with self._pings(send):
                    await self._send(send, *self.writer.begin())
                    async for delta in deltas:
                        await self._send(send, *self.writer.write(delta))
                    await self.writer.complete()
                    await self._send(send, *self.writer.end())
        except Exception as exc:
            if not self._started or isinstance(exc, SendTimeout):
                raise
            problem = describe(exc)  # the function `describe` also logs unexpected exceptions
            await self._send(send, *self.writer.fail(problem.body_for(scope)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, *events: bytes) -> None:
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        self._last_sent = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def _pings(self, send: Send) -> AsyncGenerator[None]:
        pings = asyncio.create_task(self._ping(send))
        try:
            yield
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            idle = loop.time() - self._last_sent
            if idle >= self.keep_alive:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self.keep_alive - idle)
