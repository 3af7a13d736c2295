"""Separates a model's reasoning ("thoughts"), which the model writes between `<think>` and `</think>`, from the content
of its reply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from jamba_server.server.text.filters import Tags, partial_tag
from jamba_server.server.text.parts import Part, Reasoning, Text

THINK_TAGS: Final = Tags("<think>", "</think>")

# Says where in the reply the text so far ends. "start": it is not yet known whether the reply begins with reasoning.
# "thoughts": inside the reasoning. "gap": in the line feeds after the reasoning. "content": in the content.
_Place = Literal["start", "thoughts", "gap", "content"]


# If more than this number of white-space characters come before a start tag, the tag is treated as content.
_MAX_LEADING_SPACE: Final = 32


class ReasoningFilter:
    """Turns the text between the tags into `Reasoning` parts and removes the tags.

    Some chat templates end the prompt with the start tag; then the argument `thinking` is true, and the reply begins
    with reasoning. Otherwise a start tag is recognised only at the beginning of the reply, where white space may
    precede it. A later start tag is treated as content, because a reply may mention the tag.

    Line feeds at the beginning and end of the reasoning, and at the beginning of the content after it, are removed.
    Chat templates add them again when they render the reply in a later prompt.
    """

    def __init__(self, *, thinking: bool, tags: Tags = THINK_TAGS) -> None:
        self._tags = tags
        self._place: _Place = "thoughts" if thinking else "start"
        # The last characters of the text, which are held back because they may be the beginning of a tag.
        self._held = ""
        self._line_feeds = 0  # number of line feeds at the end of the reasoning so far; they are held back
        self._begun = False  # whether the reasoning so far has a character that is not a line feed

    @property
    def thinking(self) -> bool:
        """Returns whether the text so far ends inside the reasoning."""
        return self._place == "thoughts"

    def push(self, part: Part) -> Iterator[Part]:
        if not isinstance(part, Text):
            yield part
            return
        text, self._held = self._held + part.text, ""
        if self._place == "start":
            text = self._find_start(text)
        if self._place == "thoughts":
            thoughts, text = self._find_end(text)
            if thoughts:
                yield Reasoning(thoughts)
        if self._place == "gap" and (text := text.lstrip("\n")):
            self._place = "content"
        if self._place == "content" and text:
            yield Text(text)

    def flush(self) -> Iterator[Part]:
        if self._place == "start" and self._held:
            yield Text(self._held)
        elif self._place == "thoughts" and (rest := "\n" * self._line_feeds + self._held):
            yield Reasoning(rest)

    def _find_start(self, text: str) -> str:
        """Looks for the start tag at the beginning of the reply. If the text does not yet show whether the tag is
        there, holds the text back and returns "". Otherwise returns the text after the tag, or the whole text if there
        is no tag."""
        begin = text.lstrip()
        few_spaces = len(text) - len(begin) <= _MAX_LEADING_SPACE
        if few_spaces and begin.startswith(self._tags.start):
            self._place = "thoughts"
            return begin.removeprefix(self._tags.start)
        if few_spaces and self._tags.start.startswith(begin):
            self._held = text
            return ""
        self._place = "content"
        return text

    def _find_end(self, text: str) -> tuple[str, str]:
        """Looks for the end tag. Returns the reasoning text that can be sent now, and the text after the end tag."""
        thoughts, end_tag, rest = text.partition(self._tags.end)
        if end_tag:
            self._place = "gap"
        elif size := partial_tag(text, self._tags.end):
            thoughts, self._held = text[:-size], text[-size:]
        if not self._begun:
            thoughts = thoughts.lstrip("\n")
        inner = thoughts.rstrip("\n")
        num_line_feeds = len(thoughts) - len(inner)
        if not inner:
            self._line_feeds += num_line_feeds
            return "", rest
        certain = "\n" * self._line_feeds + inner
        self._line_feeds, self._begun = num_line_feeds, True
        return certain, rest
