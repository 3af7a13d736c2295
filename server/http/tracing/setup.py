"""Switches the recording of spans on, if the operator wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.middleware import Middleware

from jamba_server.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tracing:
    """`middleware` returns the middleware that records spans, except for requests on the given paths. `close` sends the
    last spans; it may take some seconds."""

    middleware: Callable[[frozenset[str]], Middleware]
    close: Callable[[], None]


def open_tracing(endpoint: str | None, version: str) -> Tracing | None:
    """Returns what records spans and sends them to the URL `endpoint`, or None if there is no such URL.

    Raises ConfigError if the packages of OpenTelemetry are not installed.
    """
    if endpoint is None:
        return None
    try:
        # These packages take long to import, and they are optional.
        from jamba_server.server.http.tracing import spans
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint needs OpenTelemetry: pip install 'jamba-server[otel]' ({error})."
        ) from error
    provider = spans.tracer_provider(endpoint, version)
    return Tracing(
        middleware=lambda ignored: Middleware(spans.Tracing, provider=provider, ignored=ignored),
        close=provider.shutdown,
    )
