"""Adds attributes to the OpenTelemetry span of the current request. This module does not import OpenTelemetry, which is
optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

Value = str | bool | int | float | Sequence[str]


class SpanContext(Protocol):
    """The attributes of OpenTelemetry's class `SpanContext` that this server uses: the ids of a span, as numbers."""

    @property
    def trace_id(self) -> int: ...

    @property
    def span_id(self) -> int: ...


class Span(Protocol):
    """The methods of OpenTelemetry's class `Span` that this server uses."""

    def set_attribute(self, key: str, value: Value) -> None: ...

    def get_span_context(self) -> SpanContext: ...

    def is_recording(self) -> bool: ...


# The OpenTelemetry span of the request that the current asyncio task answers, or None if the server records no spans.
CURRENT_SPAN: ContextVar[Span | None] = ContextVar("current_span", default=None)


def annotate(attributes: Mapping[str, Value | None]) -> None:
    """Adds the attributes to the span of the current request, except those whose value is None."""
    if (span := CURRENT_SPAN.get()) is None:
        return
    for key, value in attributes.items():
        if value is not None:
            span.set_attribute(key, value)


def exemplar() -> dict[str, str] | None:
    """Returns the ids of the current request's span, in the form in which an exemplar of a metric has them. Returns
    None if the span is not recorded."""
    if (span := CURRENT_SPAN.get()) is None or not span.is_recording():
        return None
    ids = span.get_span_context()
    return {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"}
