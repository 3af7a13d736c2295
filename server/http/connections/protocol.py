"""The class `Connection` is uvicorn's HTTP connection with deadlines for what the client sends."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from jamba_server.engine.errors import Overloaded
from jamba_server.server.http.errors import Problem, error_response
from jamba_server.server.http.streams.reply import CLOSE_CONNECTION

# If a reply is sent before the request's body was read, the client may go on sending the body for this time in seconds.
# If the server closed the connection at once, the client's operating system would discard the reply.
LINGER_SECONDS = 5.0
REFUSAL_SECONDS = 2.0  # time in seconds in which a client must send a request that will be refused
# The body of a refused request is read up to this number of bytes, so that the client receives the reply.
REFUSED_BODY_BYTES = 256 * 1024
RETRY_AFTER_SECONDS = 1
# A connection is cut off this number of seconds after the time limit for sending. A stream notices the same limit by
# itself, and its log and its metric then say the reason.
SEND_GRACE_SECONDS = 5.0
CLOSE = (b"connection", b"close")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """Says how one connection is to be served.

    The client must send the headers of each request within `header_seconds`. If it reads nothing of what it is sent for
    `send_seconds`, the connection is cut off. If `refused` is true, the connection's
    only request gets status 503. The function `crowded` says whether so many connections are open that each connection
    is closed after its reply. The function `lost` is called when the connection has ended.
    """

    header_seconds: float
    send_seconds: float
    refused: bool
    crowded: Callable[[], bool]
    lost: Callable[[], None]


class Connection(H11Protocol):
    """The asyncio protocol of one HTTP/1.1 connection of a client. It adds deadlines to uvicorn's implementation.

    At most one deadline is set at a time: for the headers of the next request, or for the rest of a body after the
    reply was already sent. For a body that the application still reads, the class `JsonBody` sets a deadline.

    Another timer runs while the client does not read all that it is sent. A connection that is closed waits for such a
    client, too, so the timer also runs then.
    """

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], manner: Manner) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._manner = manner
        self._served: ASGIApp = self.app  # pyright: ignore[reportAttributeAccessIssue]  # uvicorn's type of the same
        self.app = refuse if manner.refused else self._run  # pyright: ignore[reportAttributeAccessIssue]
        self._deadline: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._lingers = False  # whether the deadline is for the rest of a request's body whose reply was already sent

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._set_deadline(REFUSAL_SECONDS if self._manner.refused else self._manner.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._stop_send_timer()
        self._manner.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            self._clear_deadline()
        elif self.conn.their_state is h11.IDLE:  # the headers of a request are not complete yet
            if self._deadline is None or self._lingers:
                self._set_deadline(self._manner.header_seconds)
        elif not self.cycle.response_complete:
            self._clear_deadline()

    def on_response_complete(self) -> None:
        self._clear_deadline()
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_send_timer()
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._set_deadline(self._manner.header_seconds)
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            self._set_deadline(LINGER_SECONDS, lingers=True)

    def _set_deadline(self, seconds: float, *, lingers: bool = False) -> None:
        self._clear_deadline()
        self._lingers = lingers
        self._deadline = self.loop.call_later(seconds, self._expire)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        """Closes the connection, because a deadline has passed. A client that has sent only a part of its headers first
        gets a reply with status 408."""
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            message = f"The headers of the request are not complete after {self._manner.header_seconds:g} s."
            problem = Problem(status=408, message=message, code="request_timeout")
            self.transport.write(_raw_reply(problem, b"Request Timeout"))
        self.transport.close()
        self._start_send_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_send_timer()

    def pause_writing(self) -> None:
        """Is called by the transport when many bytes wait for the client."""
        super().pause_writing()
        self._start_send_timer()

    def resume_writing(self) -> None:
        """Is called by the transport when the client has read most of the bytes that waited."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_send_timer()

    def _start_send_timer(self) -> None:
        """If bytes wait for the client, makes sure that the connection is cut off when the client reads none of them
        within the time limit."""
        waiting = self.transport.get_write_buffer_size()
        if self._send_timer is None and waiting:
            seconds = self._manner.send_seconds + SEND_GRACE_SECONDS
            self._send_timer = self.loop.call_later(seconds, self._check_sending, waiting)

    def _check_sending(self, waiting: int) -> None:
        """Cuts off the connection if as many bytes as before, `waiting`, still wait for the client."""
        self._send_timer = None
        if self.transport.get_write_buffer_size() >= waiting:
            self.transport.abort()
        else:
            self._start_send_timer()

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the application for one request. If too many connections are open, the header `connection: close` is
        added to the reply. The application gets a function that closes the connection."""

        async def send_or_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._manner.crowded():
                message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
            await send(message)

        scope.setdefault("extensions", {})[CLOSE_CONNECTION] = self.transport.abort
        await self._served(scope, receive, send_or_close)


def _raw_reply(problem: Problem, reason: bytes) -> bytes:
    body = problem.body_for({"path": "", "state": {"request_id": ""}})
    head = b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (problem.status, reason, len(body)) + body


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application that answers every request with status 503 and closes the connection."""
    size, more = 0, True
    while more and size <= REFUSED_BODY_BYTES:
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                message = await receive()
        except TimeoutError:
            break
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
    message = "The server has as many connections as it can serve (--max-connections)."
    reply = error_response(Overloaded(message, retry_after=RETRY_AFTER_SECONDS), scope)
    reply.headers["connection"] = "close"
    await reply(scope, receive, send)
