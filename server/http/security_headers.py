"""The middleware `SecurityHeaders` adds headers that tell browsers what not to do with a reply."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Browsers must not guess another media type, show a reply inside another page, or tell other sites this address.
HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
# A page may load scripts, styles and data only from this server. Swagger UI needs inline scripts and styles, and images
# in `data:` URLs. A reply that is not a page may load nothing.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
# A browser that has seen this header uses only HTTPS for this host, for 180 days.
TRANSPORT_SECURITY = f"max-age={180 * 24 * 3600}"


class SecurityHeaders:
    """Adds the headers to every reply. `tls` says whether this server is reached over TLS."""

    def __init__(self, app: ASGIApp, *, tls: bool) -> None:
        self.app, self.tls = app, tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                page = headers.get("content-type", "").startswith("text/html")
                headers.update(HEADERS)
                headers.setdefault("Content-Security-Policy", PAGE_POLICY if page else DATA_POLICY)
                if self.tls:
                    headers.setdefault("Strict-Transport-Security", TRANSPORT_SECURITY)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
