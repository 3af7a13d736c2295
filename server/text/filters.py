"""Content filters: objects that divide the text of a reply into parts (text, reasoning, tool calls) while the text
arrives in pieces.

A reply passes through a chain of filters: for stop strings, then for reasoning, then for tool calls. The joined parts
that a chain returns do not depend on how the text was divided into pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from jamba_server.server.text.parts import Part


class Tags(NamedTuple):
    """A start tag and an end tag, such as `<think>` and `</think>`. Between them the model writes something other than
    ordinary content."""

    start: str
    end: str


class Filter(Protocol):
    """Turns a stream of parts into another stream of parts.

    The method `push` takes the next part and returns the parts that can no longer change. It holds back text that may
    be the beginning of a tag. The method `flush` is called once, at the end of the reply, and returns the text that was
    held back.
    """

    def push(self, part: Part) -> Iterable[Part]: ...

    def flush(self) -> Iterable[Part]: ...


class Chain:
    """Several filters, each of which receives the parts that the filter before it returns."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = filters

    def push(self, part: Part) -> list[Part]:
        return self._through(0, [part])

    def flush(self) -> list[Part]:
        parts: list[Part] = []
        for number, last in enumerate(self._filters, start=1):
            parts += self._through(number, last.flush())
        return parts

    def _through(self, first: int, parts: Iterable[Part]) -> list[Part]:
        """Passes the parts through the filters of the chain, beginning with the filter number `first`."""
        for stage in self._filters[first:]:
            parts = [result for part in parts for result in stage.push(part)]
        return list(parts)


def partial_tag(text: str, tag: str) -> int:
    """Returns the number of characters at the end of `text` that could be the beginning of `tag`."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
