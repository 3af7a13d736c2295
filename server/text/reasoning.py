"""Separates a model's thoughts, which stand between `<think>` and `</think>`, from the content of its reply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from jamba_server.server.text.filters import Tags, partial_tag
from jamba_server.server.text.parts import Part, Reasoning, Text

THINK_TAGS: Final = Tags("<think>", "</think>")

# Where the text so far ends: before it is known whether there are thoughts, inside the thoughts, in the line feeds
# after the thoughts, or in the content.
_Place = Literal["start", "thoughts", "gap", "content"]


_MAX_LEADING_SPACE: Final = 32  # a start tag after more white space than this number of characters is content


class ReasoningFilter:
    """Turns the text between the tags into `Reasoning` parts and removes the tags.

    Some chat templates end the prompt with the start tag; then `thinking` is true and the reply begins with thoughts.
    Otherwise thoughts are looked for only at the beginning of the reply, after white space at most. A start tag further
    on is content, because a reply may speak about the tag.

    Line feeds beside the tags are layout that chat templates add again when they render the reply in a later prompt.
    They are removed: those at both ends of the thoughts and those at the start of the content after thoughts.
    """

    def __init__(self, *, thinking: bool, tags: Tags = THINK_TAGS) -> None:
        self._tags = tags
        self._place: _Place = "thoughts" if thinking else "start"
        self._held = ""  # the end of the text, which may be the beginning of a tag
        self._line_feeds = 0  # number of line feeds at the end of the thoughts so far, which are held back
        self._begun = False  # whether the thoughts have a character that is not a line feed

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the thoughts."""
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
        """Looks for the start tag at the beginning of the reply. Returns the text that follows the decision, or holds
        all of the text back if nothing is decided yet."""
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
        """Returns the thoughts that are certain now and the text behind the end tag."""
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
