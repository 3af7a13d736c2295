"""The parts of a model's reply: ordinary text, reasoning and tool calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the reply's ordinary text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the text that the model wrote between its reasoning tags, without the tags."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A piece of one tool call. `index` is the number of the call among the calls of its reply, counted from 0.

    The first piece of a call has the call's `id` and `name`; in later pieces both are empty. The field `arguments` is
    a piece of JSON text. The arguments of all pieces of a call, one after the other, are the arguments of the call.
    """

    index: int
    id: str
    name: str
    arguments: str


Part = Text | Reasoning | ToolCall


def join(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Returns the parts of a reply, with consecutive parts of the same kind merged into one part. Consecutive pieces of
    one tool call become one piece."""
    return tuple(_join_run(list(run)) for _, run in itertools.groupby(parts, key=_kind))


def _kind(part: Part) -> tuple[type[Part], int]:
    return type(part), part.index if isinstance(part, ToolCall) else 0


def _join_run(run: Sequence[Part]) -> Part:
    first = run[0]
    if isinstance(first, ToolCall):
        return replace(first, arguments="".join(part.arguments for part in run if isinstance(part, ToolCall)))
    return replace(first, text="".join(part.text for part in run if not isinstance(part, ToolCall)))
