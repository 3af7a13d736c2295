"""The headers of streams that go on although their client has lost its connection."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected

ON_DISCONNECT = "X-On-Disconnect"
STREAM_ID = "X-Stream-Id"
LAST_EVENT_ID = "Last-Event-ID"  # the HTML standard defines this header for the browsers' class `EventSource`
# The paths of the endpoints that generate replies, which may be streams.
STREAM_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
_EVENT_ID = re.compile(r"([\w-]{1,128}):([0-9]{1,15})", re.ASCII)


class EventId(NamedTuple):
    """The id of a server-sent event: the id of its stream, and its number in the stream."""

    stream: str
    number: int


def continues_without_client(scope: Scope, *, stream: bool) -> bool:
    """Returns whether the client wants its request to go on after the connection has broken. The argument `stream` says
    whether the reply is a stream.

    Raises RequestRejected if the header X-On-Disconnect has an unknown value, or asks for this although the reply is no
    stream.
    """
    value = Headers(scope=scope).get(ON_DISCONNECT, "abort")
    if value not in ("abort", "continue"):
        raise RequestRejected(
            f"The header {ON_DISCONNECT} is {value[:32]!r}; it must be abort or continue.", code="unsupported_header"
        )
    if value == "continue" and not stream:
        raise RequestRejected(
            f"The header {ON_DISCONNECT} is continue, which needs stream: true.", code="unsupported_header"
        )
    return value == "continue"


def is_resumption(scope: Scope) -> bool:
    """Returns whether a request asks for the rest of a stream, by the header Last-Event-ID on the path of the request
    that made the stream."""
    return scope["method"] == "POST" and _path(scope) in STREAM_PATHS and LAST_EVENT_ID in Headers(scope=scope)


def begins_nothing(scope: Scope) -> bool:
    """Returns whether a request is about a stream that exists already. Such a request runs nothing in the engine, so it
    is not counted against limits on running and waiting requests."""
    return is_resumption(scope) or _path(scope).startswith("/v1/streams/")


def last_event(scope: Scope) -> EventId:
    """Returns the event that the header Last-Event-ID names. Raises RequestRejected if it is not the id of an event of
    this server."""
    value = Headers(scope=scope)[LAST_EVENT_ID]
    if (match := _EVENT_ID.fullmatch(value)) is None:
        raise RequestRejected(
            f"The header {LAST_EVENT_ID} is {value[:64]!r}; it must be the id of an event of a kept stream.",
            code="unsupported_header",
        )
    return EventId(match[1], int(match[2]))


def body_digest(body: bytes) -> bytes:
    """Returns a hash by which the server recognises the body of a request."""
    return hashlib.sha256(body).digest()


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
