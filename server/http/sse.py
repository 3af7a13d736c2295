"""Server-sent events, and the watch for clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jamba_server.server.http.errors import describe, request_id_of

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
ACCEPTED = b""  # an event without bytes: the request is under way, so the reply may begin


def event(payload: BaseModel, *, exclude: set[str] | None = None) -> bytes:
    return b"data: " + payload.model_dump_json(exclude=exclude).encode() + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client goes away first, `work` is cancelled and ClientDisconnect raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come, and a comment whenever nothing came for `keep_alive` seconds.

    The reply begins with the first event. What `events` raises before is an ordinary error reply; what it raises later
    is one last event. When the client goes away, `events` is closed at once, also while it waits.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], *, keep_alive: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.keep_alive = keep_alive
        self._started, self._last_sent = False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._stream(scope, send))
        except ClientDisconnect:
            if not self._started:
                raise

    async def _stream(self, scope: Scope, send: Send) -> None:
        async with aclosing(self.events) as events:
            first = await anext(events)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pings = asyncio.create_task(self._ping(send))
            try:
                await self._send(send, first)
                async for item in events:
                    await self._send(send, item)
            except Exception as exc:  # noqa: BLE001 - `describe` logs what it does not know
                problem = describe(exc)
                await self._send(send, b"data: " + problem.body(request_id_of(scope)) + b"\n\n")
            finally:
                pings.cancel()
                await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_sent = asyncio.get_running_loop().time()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            idle = loop.time() - self._last_sent
            if idle >= self.keep_alive:
                await self._send(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self.keep_alive - idle)
