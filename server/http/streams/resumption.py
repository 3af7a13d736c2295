"""The middleware `Resumption` answers requests that ask for the rest of a stream with the header Last-Event-ID."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.errors import StreamNotFound, tenant_of
from jamba_server.server.http.streams.headers import LAST_EVENT_ID, body_digest, is_resumption, last_event
from jamba_server.server.http.streams.registry import KeptStreams
from jamba_server.server.http.streams.reply import StreamReply


class Resumption:
    """Answers a request with the header Last-Event-ID, which clients for server-sent events add when they repeat a
    request after their connection has broken. The reply has the events after the one that the header names.

    The body must be that of the original request. No request with this header begins a new reply, because a new reply
    would differ from the beginning that the client already has.
    """

    def __init__(self, app: ASGIApp, *, streams: KeptStreams, send_timeout: float) -> None:
        self.app, self.streams, self.send_timeout = app, streams, send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_resumption(scope):
            await self.app(scope, receive, send)
            return
        last = last_event(scope)
        stream = self.streams.find(last.stream, tenant_of(scope))
        if stream.path != scope["path"]:
            raise StreamNotFound(f"The stream {last.stream!r} was not made by a request to this path.")
        if body_digest(await Request(scope, receive).body()) != stream.digest:
            raise RequestRejected(
                f"The request has the header {LAST_EVENT_ID}, but its body is not that of the request which made the "
                "stream."
            )
        await StreamReply(stream, self.streams, last.number + 1, self.send_timeout)(scope, receive, send)
