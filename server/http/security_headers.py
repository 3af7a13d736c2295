"""The function `add_security_headers` adds the usual security headers to a reply, which restrict what browsers do with
the reply."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders

# With these headers, browsers do not guess another media type, do not show a reply inside the page of another site, and
# do not tell other sites the address of this page.
HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
# HTML pages of this server may load scripts, styles and data only from this server. Swagger UI, the page /docs, needs
# inline scripts and styles, and images in `data:` URLs. Replies that are not HTML pages may load nothing.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
# A browser that has seen this header uses only HTTPS for this host, for 180 days.
TRANSPORT_SECURITY = f"max-age={180 * 24 * 3600}"


def add_security_headers(headers: MutableHeaders, *, tls: bool) -> None:
    """Adds the headers to those of a reply. `tls` says whether this server is reached over TLS."""
    page = headers.get("content-type", "").startswith("text/html")
    headers.update(HEADERS)
    headers.setdefault("Content-Security-Policy", PAGE_POLICY if page else DATA_POLICY)
    if tls:
        headers.setdefault("Strict-Transport-Security", TRANSPORT_SECURITY)
