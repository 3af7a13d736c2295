"""Attaches fields, such as a request's id, to log records. With `--log-format json` the log shows them as separate JSON
members."""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "fields"  # name of the attribute under which a log record holds the fields


def fields(**values: object) -> dict[str, Any]:
    """Returns a value for the argument `extra` of a logging call. Fields whose value is None or an empty text are left
    out."""
    return {ATTRIBUTE: {name: value for name, value in values.items() if value not in (None, "")}}
