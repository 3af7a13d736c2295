"""Finds the boundaries of messages in a prompt, whatever the chat template.

Marks (`special_text.place_mark`) are inserted into the contents of a few messages, and the marked conversation is
rendered beside the plain one. If the two prompts are equal except for the marks, the marks show the boundaries.

A boundary is useful only if a later request has the same prompt before it. Some templates change earlier messages when
the conversation goes on: Jamba Reasoning's puts an instruction in front of the last user message, and Jamba 1.5's puts
documents there. So the conversation is also rendered as it will be after one more reply and one more question, and
boundaries behind the first difference are moved to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jamba_server.server.text.special_text import MAX_PLACES, place_mark

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a conversation. It is at the first character of the content of message `index` that is no white space,
    or, with `at_end`, behind the last such character."""

    index: int
    at_end: bool = False


def boundary_counts(messages: Sequence[Mapping[str, object]], save_after: Sequence[int]) -> list[int]:
    """Returns, for each boundary, the number of messages before it: those before the first message that is no system
    message, those before the last user message, and those up to each message in `save_after`."""
    roles = [message.get("role") for message in messages]
    counts = {int(roles[:1] == ["system"]), *(index + 1 for index in save_after)}
    if "user" in roles:
        counts.add(len(roles) - 1 - roles[::-1].index("user"))
    return sorted(counts)


def place_of(count: int, messages: Sequence[Mapping[str, object]]) -> Place | None:
    """Returns the place that stands for the boundary after the first `count` messages, or None if there is none.

    Usually it is the beginning of the next message's content. Templates examine how an assistant's content begins, and
    some contents are empty; then the place is the end of the previous message's content, if that may be marked.
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
    """Returns a copy of the messages with the mark of `places[i]` at that place, for each i. White space at both ends
    of a content stays outside, because templates strip it."""
    assert len(places) <= MAX_PLACES, "each place needs a mark of its own"
    marked = list(messages)
    for number, place in enumerate(places):
        content: str = marked[place.index]["content"]
        at = len(content.rstrip()) if place.at_end else len(content) - len(content.lstrip())
        marked[place.index] = marked[place.index] | {"content": content[:at] + place_mark(number) + content[at:]}
    return marked


def next_turn(messages: Messages) -> Messages:
    """Returns the conversation as a client is likely to send it the next time: with a reply and another question."""
    reply = [] if messages[-1].get("role") == "assistant" else [{"role": "assistant", "content": "x"}]
    return [*messages, *reply, {"role": "user", "content": "x"}]


def common_length(a: str, b: str) -> int:
    """Returns the number of characters that two texts have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
