"""Time limits of requests: a client may say how many seconds it will wait for the complete reply.

The client sends the seconds in the header `X-Request-Timeout`, which every endpoint reads, or in the field `timeout` of
a body. When the time is over, the request is aborted, and the client gets status 504 or, in a stream, an error event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.errors import DeadlineExceeded
from jamba_server.server.http.schemas.base import MAX_TIMEOUT_SECONDS

HEADER = "X-Request-Timeout"


def set_arrival(scope: Scope, now: float) -> None:
    """Stores in the ASGI scope the time at which a request arrived, in seconds of the event loop's clock."""
    scope["state"]["arrived"] = now


def set_timeout(scope: Scope, seconds: float | None) -> None:
    """Stores in the ASGI scope the value of the request's field `timeout`, which takes precedence over the header
    X-Request-Timeout."""
    if seconds is not None:
        scope["state"]["timeout"] = seconds


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The time limit of one request. The limit is `seconds` seconds long and counts from the arrival of the request.
    `end` is the time at which it expires, in seconds of the event loop's clock."""

    end: float
    seconds: float


def time_limit_of(scope: Scope) -> TimeLimit | None:
    """Returns the time limit of a request, or None if the client gave none.

    Raises RequestRejected if the header does not hold a number of seconds.
    """
    seconds = _timeout_of(scope)
    return None if seconds is None else TimeLimit(scope["state"]["arrived"] + seconds, seconds)


@asynccontextmanager
async def enforced(limit: TimeLimit | None) -> AsyncGenerator[None]:
    """Async context manager: cancels the `async with` block when the time limit expires, and raises DeadlineExceeded.
    If `limit` is None, there is no limit."""
    timeout = asyncio.timeout_at(limit.end if limit else None)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if limit is not None and timeout.expired():
            raise DeadlineExceeded(f"The reply was not complete after {limit.seconds:g} s.") from None
        raise


def _timeout_of(scope: Scope) -> float | None:
    if (seconds := scope["state"].get("timeout")) is not None:
        return seconds
    if (text := Headers(scope=scope).get(HEADER)) is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise RequestRejected(
            f"The header {HEADER} is {text[:32]!r}; it must be a number of seconds above 0 and at most "
            f"{MAX_TIMEOUT_SECONDS}."
        )
    return seconds
