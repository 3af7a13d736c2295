"""A row is a request field with a value that changes what the engine is asked for or what the client reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Body = Mapping[str, Any]
# Maps a path in a JSON value, such as "choices.0.text", to the expected value or to a function that checks the value.
Expected = Mapping[str, Any]

HELLO = (" hello the world",)
_MISSING = object()
DIFFERS = object()  # expects another value than that of the same request without the row's field


@dataclass(frozen=True, kw_only=True)
class Row:
    """A field of a request, and what it changes. The field has the name that the OpenAPI document gives it, without
    positions in lists, such as `messages.tool_calls.id`.

    The request has the fields of the endpoint's own example, of `base` and of `body`. All that `engine`, `reply`,
    `prompt` and `headers` expect must be true for this request, and must not be true for the same request without
    `body`. The paths of `engine` begin at the list of the engine's requests, those of `reply` at the reply. `prompt` is
    a text that the prompt contains. `says` has the replies that the model writes.
    """

    field: str
    body: Body
    base: Body = dataclasses.field(default_factory=dict[str, Any])
    says: tuple[str, ...] = HELLO
    model: Literal["jamba", "reasoning"] = "jamba"
    engine: Expected = dataclasses.field(default_factory=dict[str, Any])
    reply: Expected = dataclasses.field(default_factory=dict[str, Any])
    prompt: str = ""
    headers: Expected = dataclasses.field(default_factory=dict[str, Any])
    streamed: bool = True
    unstreamed: bool = True

    def __str__(self) -> str:
        return self.field


@dataclass(frozen=True)
class Inert:
    """A field that is accepted and changes neither the engine's request nor the reply."""

    field: str
    body: Body
    base: Body = dataclasses.field(default_factory=dict[str, Any])
    unstreamed: bool = True

    def __str__(self) -> str:
        return self.field


@dataclass(frozen=True)
class Refused:
    """A field with a value that is refused. The error names `param`, which is the field unless it is given."""

    field: str
    body: Body
    param: str = ""

    def __str__(self) -> str:
        return self.field


def params(**values: Any) -> dict[str, Any]:
    """Returns the expectation that the engine's first request has these sampling parameters."""
    return {f"0.params.{name}": value for name, value in values.items()}


def some(value: object) -> bool:
    """Returns whether there is a value that is not empty."""
    return value is not _MISSING and bool(value)


def contains(text: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and text in value


def at(path: str, value: Any) -> Any:
    """Returns the item at a path, or a special object if there is none."""
    for name in path.split("."):
        if isinstance(value, list) and name.lstrip("-").isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, Mapping) and name in value:
            value = value[name]
        else:
            return _MISSING
    return value


def met(path: str, expected: Any, value: Any, other: Any) -> bool:
    """Returns whether the item at a path of `value` is as expected. `other` is the corresponding value for the request
    without the row's field."""
    found = at(path, value)
    if expected is DIFFERS:
        return found != at(path, other)
    return bool(expected(found)) if callable(expected) else found is not _MISSING and found == expected


def merged(base: Body, other: Body) -> dict[str, Any]:
    return {**base, **other}
