"""The order in which the lines of a batch run.

Lines whose prompts begin alike run one after the other, so that the prefix cache still has the beginning. Of the lines
with a common beginning, first one prompt is computed, and then a second one. The second branches off from the first, so
the model's state is saved where they part. All other lines continue from this state.

What prompts have in common is found by comparing hashes of the first 64, 128, 256, ... characters of their texts, so it
is known up to a factor of two.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

# A common beginning of fewer characters is not worth an order. It would have about as many tokens as a page of the
# cache.
SHORTEST = 64
LEADERS = 2  # number of lines of a group whose prompts are computed alone
# The next line is chosen among this number of lines.
WINDOW = 256
_HASH_BYTES = 8

# The fields of bodies that are part of the prompt, in the order in which prompts usually have them.
_PROMPT_FIELDS = ("tools", "instructions", "messages", "input", "prompt")


def prompt_text(body: Mapping[str, Any]) -> str:
    """Returns the texts of a request's prompt, in their order and with marks in between. The names of fields are left
    out, because all requests have them in common."""
    return "\x1f".join(_texts([body.get(name) for name in _PROMPT_FIELDS]))


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in cast("list[object]", value):
                yield from _texts(item)
        case dict():
            for item in cast("dict[str, object]", value).values():
                yield from _texts(item)
        case int():
            yield str(value)
        case _:
            return


Beginnings = tuple[bytes, ...]


def beginnings(body: Mapping[str, Any]) -> Beginnings:
    """Returns hashes of the beginnings of a prompt's text, the shortest first."""
    text = prompt_text(body)
    found: list[bytes] = []
    length = SHORTEST
    while length <= len(text):
        digest = hashlib.blake2b(text[:length].encode(errors="replace"), digest_size=_HASH_BYTES)
        found.append(digest.digest())
        length *= 2
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Pending:
    """A line that has not run. `size` is the number of its bytes."""

    number: int
    offset: int
    size: int
    beginnings: Beginnings


class Order:
    """The lines of a batch that have not begun, in the order in which they should run."""

    def __init__(self, lines: Iterable[Pending]) -> None:
        self._lines = sorted(lines, key=lambda line: (line.beginnings, line.number))
        # For each beginning that several lines share: how many of their prompts have been computed, and how many are
        # being computed now.
        shared = Counter(beginning for line in self._lines for beginning in line.beginnings)
        self._computed = {beginning: 0 for beginning, number in shared.items() if number > 1}
        self._computing = dict.fromkeys(self._computed, 0)
        self._begun: set[int] = set()  # numbers of the lines whose prompts are being computed
        self._next = 0  # all lines before this index have been taken
        self._taken: set[int] = set()  # indices, from `_next` on, of lines that have been taken

    def __len__(self) -> int:
        return len(self._lines) - self._next - len(self._taken)

    def take(self) -> Pending | None:
        """Removes and returns the line that should run next, or returns None if all near lines wait for others."""
        for index in range(self._next, min(len(self._lines), self._next + WINDOW)):
            line = self._lines[index]
            if index not in self._taken and self._may_run(line):
                self._taken.add(index)
                while self._next in self._taken:
                    self._taken.remove(self._next)
                    self._next += 1
                self._begun.add(line.number)
                self._count(self._computing, line, 1)
                return line
        return None

    def computed(self, line: Pending) -> None:
        """Must be called when the prompt of a line that was taken has been computed, or when the line has ended, in
        whatever way. Further calls do nothing."""
        if line.number in self._begun:
            self._begun.remove(line.number)
            self._count(self._computing, line, -1)
            self._count(self._computed, line, 1)

    def clear(self) -> list[Pending]:
        """Removes and returns all lines that have not been taken."""
        left = [line for i, line in enumerate(self._lines) if i >= self._next and i not in self._taken]
        self._lines, self._next, self._taken = [], 0, set()
        return left

    def _may_run(self, line: Pending) -> bool:
        return all(
            self._computed[beginning] >= LEADERS or not self._computing[beginning]
            for beginning in line.beginnings
            if beginning in self._computed
        )

    @staticmethod
    def _count(counts: dict[bytes, int], line: Pending, change: int) -> None:
        for beginning in line.beginnings:
            if beginning in counts:
                counts[beginning] += change
