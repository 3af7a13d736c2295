"""Starts the recording of OpenTelemetry spans, if the operator has given an endpoint to which spans are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.middleware import Middleware

from jamba_server.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tracing:
    """The two functions that the application needs in order to record spans. `middleware` returns the middleware that
    records spans, except for requests to the given paths. `close` sends the last spans, which may take some seconds."""

    middleware: Callable[[frozenset[str]], Middleware]
    close: Callable[[], None]


def open_tracing(endpoint: str | None, version: str) -> Tracing | None:
    """Prepares the recording of spans, which are sent to the URL `endpoint`. Returns None if `endpoint` is None.

    Raises ConfigError if the packages of OpenTelemetry are not installed.
    """
    if endpoint is None:
        return None
    try:
        # The packages of OpenTelemetry are imported only here, because they are optional and their import takes long.
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
