"""The parts of a model's reply: ordinary text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Returns the parts of a reply, with neighbours of the same kind merged into one part. Neighbouring pieces of one
    tool call become one piece."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        match last, part:
            case (Text(before), Text(text)):
                joined[-1] = Text(before + text)
            case (Reasoning(before), Reasoning(text)):
                joined[-1] = Reasoning(before + text)
            case (ToolCall(), ToolCall()) if last.index == part.index:
                joined[-1] = replace(last, arguments=last.arguments + part.arguments)
            case _:
                joined.append(part)
    return tuple(joined)
