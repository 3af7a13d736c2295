"""Finds the offsets in a prompt at which messages begin or end. This works with any chat template.

Marks, which are characters that ordinary text does not contain (`special_text.place_mark`), are inserted into the
contents of a few messages. The conversation is rendered both with and without marks. If the two prompts are equal
except for the marks, the positions of the marks are the boundaries.

The boundaries say where the model's state is worth saving. That is useful only if a later request has the same prompt
up to the boundary. Some templates change earlier messages when the conversation goes on: the template of Jamba
Reasoning puts an instruction in front of the last user message, and the template of Jamba 1.5 puts documents there. So
the conversation is also rendered with one more reply and one more question, and boundaries after the first difference
are moved to that difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jamba_server.server.text.special_text import MAX_PLACES, place_mark

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a conversation at which a mark is inserted. It is before the first character of the content of
    message `index` that is not white space, or, if `at_end` is true, after the last such character."""

    index: int
    at_end: bool = False


def boundary_counts(messages: Sequence[Mapping[str, object]], save_after: Sequence[int]) -> list[int]:
    """Chooses the message boundaries after which the model's state should be saved: after the system message, before
    the last user message, and after each message in `save_after`. Returns the number of messages before each
    boundary."""
    roles = [message.get("role") for message in messages]
    counts = {int(roles[:1] == ["system"]), *(index + 1 for index in save_after)}
    if "user" in roles:
        counts.add(len(roles) - 1 - roles[::-1].index("user"))
    return sorted(counts)


def place_of(count: int, messages: Sequence[Mapping[str, object]]) -> Place | None:
    """Returns the position at which a mark is inserted in order to find the boundary after the first `count` messages,
    or None if no mark can be inserted there.

    Usually this is the beginning of the next message's content. If the next message is the assistant's, whose beginning
    some templates examine, or has no text, the end of the previous message's content is used instead, if that message
    has text and no tool calls.
    """
    if count < len(messages) and messages[count].get("role") != "assistant" and _has_text(messages[count]):
        return Place(count)
    if count > 0 and _has_text(messages[count - 1]) and not messages[count - 1].get("tool_calls"):
        return Place(count - 1, at_end=True)
    return None


def _has_text(message: Mapping[str, object]) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def mark(messages: Messages, places: Sequence[Place]) -> Messages:
    """Returns a copy of the messages with marks inserted: the mark number i at the position `places[i]`. White space at
    the beginning and end of a content stays outside of the marks, because templates strip it."""
    assert len(places) <= MAX_PLACES, "each place needs a mark of its own"
    marked = list(messages)
    for number, place in enumerate(places):
        content: str = marked[place.index]["content"]
        at = len(content.rstrip()) if place.at_end else len(content) - len(content.lstrip())
        marked[place.index] = marked[place.index] | {"content": content[:at] + place_mark(number) + content[at:]}
    return marked


def next_turn(messages: Messages) -> Messages:
    """Returns the conversation as a client is likely to send it next: with a reply and another question added."""
    reply = [] if messages[-1].get("role") == "assistant" else [{"role": "assistant", "content": "x"}]
    return [*messages, *reply, {"role": "user", "content": "x"}]


def common_length(a: str, b: str) -> int:
    """Returns the length of the longest common prefix of two texts, in characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
