"""Adds attributes to the OpenTelemetry span of the current request. This module does not import OpenTelemetry, which is
optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol

Value = str | bool | int | float | Sequence[str]


class Span(Protocol):
    """The methods of OpenTelemetry's class `Span` that this server uses."""

    def set_attribute(self, key: str, value: Value) -> None: ...


# The OpenTelemetry span of the request that the current asyncio task answers, or None if the server records no spans.
CURRENT_SPAN: ContextVar[Span | None] = ContextVar("current_span", default=None)


def annotate(attributes: Mapping[str, Value | None]) -> None:
    """Adds the attributes to the span of the current request, except those whose value is None."""
    if (span := CURRENT_SPAN.get()) is None:
        return
    for key, value in attributes.items():
        if value is not None:
            span.set_attribute(key, value)
