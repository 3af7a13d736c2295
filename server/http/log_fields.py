"""Gives log records fields of their own, which the log shows separately with `--log-format json`."""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "fields"  # name of the attribute of a log record that has the fields


def fields(**values: object) -> dict[str, Any]:
    """Returns the argument `extra` of a logging call. Fields whose value is None or an empty text are left out."""
    return {ATTRIBUTE: {name: value for name, value in values.items() if value not in (None, "")}}
