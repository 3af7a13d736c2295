"""The middleware `KeyLimits` counts the requests of each API key and refuses those beyond the key's limits."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jamba_server.server.http.errors import tenant_of
from jamba_server.server.http.limits.keys import Keys
from jamba_server.server.http.streams.headers import begins_nothing

# The names of the headers that tell a client the limits of its API key and what is left of them.
RATE_HEADERS = tuple(
    f"x-ratelimit-{part}-{kind}" for kind in ("requests", "tokens") for part in ("limit", "remaining", "reset")
)
COUNTED_METHODS = ("POST", "PUT", "PATCH", "DELETE")


class KeyLimits:
    """Counts requests with methods such as POST against the limits of their API key. GET requests, such as the list of
    models, do not count, and neither do requests about a stream that exists already.

    All replies to a key with limits say how much of the limits is left, in headers with the names of OpenAI's API.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self.keys.account(tenant_of(scope)) if scope["type"] == "http" else None
        if account is None:
            await self.app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        if scope["method"] not in COUNTED_METHODS or begins_nothing(scope):
            await self.app(scope, receive, send_with_limits)
            return
        try:
            with account.request():
                await self.app(scope, receive, send_with_limits)
        finally:
            # If an exception is raised here or further inside, the middleware RequestContext turns it into an error
            # reply and adds these headers to the reply.
            scope["state"].setdefault("reply_headers", {}).update(account.headers())
