"""The middleware `KeyLimits` counts the requests of each API key and refuses those beyond the key's limits."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jamba_server.server.http.errors import tenant_of
from jamba_server.server.http.limits.keys import Keys

# The headers that replies to a key with limits may have
RATE_HEADERS = tuple(
    f"x-ratelimit-{part}-{kind}" for kind in ("requests", "tokens") for part in ("limit", "remaining", "reset")
)
COUNTED_METHODS = ("POST", "PUT", "PATCH", "DELETE")


class KeyLimits:
    """Counts requests that do work. Requests that only read, such as a list of models, are free.

    Replies to all requests of a key with limits tell what is left, in the headers of OpenAI's API.
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

        if scope["method"] not in COUNTED_METHODS:
            await self.app(scope, receive, send_with_limits)
            return
        try:
            with account.request():
                await self.app(scope, receive, send_with_limits)
        finally:
            # An exception of this or of an inner middleware becomes a reply in the middleware RequestContext, which
            # adds these headers to it.
            scope["state"].setdefault("reply_headers", {}).update(account.headers())
