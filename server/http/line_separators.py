"""Keeps JSON text on one line for all clients."""

from __future__ import annotations

# JSON text may have these characters as they are, and only inside strings. Neither server-sent events nor JSON lines
# end a line at them, but `str.splitlines` does, and so do programs that use it, for example the method `iter_lines` of
# httpx.
_ESCAPES = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\u0085\u2028\u2029")


def on_one_line(body: bytes) -> bytes:
    """Returns the JSON text `body` with escapes in place of the characters at which some clients end a line."""
    for separator, escape in _ESCAPES:
        body = body.replace(separator, escape)
    return body
