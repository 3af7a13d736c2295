"""Finds the end of a JSON object in a text that arrives in pieces."""

from __future__ import annotations

import re

MAX_DEPTH = 128  # maximum nesting of objects and arrays; a deeper value counts as broken

_CLOSERS = {"{": "}", "[": "]"}
# Within a string: the end of the string, an escape, or a control character, which JSON does not allow there.
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
# Outside of strings: a quote, a bracket, or a character of no number and of none of the words true, false and null.
_OUTSIDE = re.compile(r"[^ \t\r\n:,0-9+\-.Eaeflnrstu]")


class JsonScanner:
    """Follows the strings and brackets of one JSON object or array.

    It finds where the value ends, and it finds most errors as soon as they appear. Whoever uses the value has to
    decode it, which finds the other errors. The time is linear in the length of the text. The attribute `broken` says
    whether the text cannot be the beginning of a value.
    """

    def __init__(self) -> None:
        self.broken = False
        self._closers: list[str] = []  # the closing brackets that are due, the innermost one last
        self._in_string = False
        self._escaped = False  # whether the last character was a backslash that escapes the next one

    @property
    def depth(self) -> int:
        """Number of objects and arrays that are open. It is 0 after the end of the value."""
        return len(self._closers)

    def step(self, text: str, start: int) -> int:
        """Reads `text` from the offset `start` up to the next bracket that is not in a string, this bracket included,
        or up to its end if there is no such bracket. Returns the offset behind what was read.

        If a character makes the value broken, the reading stops before that character.
        """
        at = start
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            if (match := (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)) is None:
                return len(text)
            char, at = match[0], match.end()
            if char == '"':
                self._in_string = not self._in_string
            elif char == "\\" and self._in_string:
                self._escaped = True
            elif not self._in_string and self._take_bracket(char):
                return at
            else:
                self.broken = True
                return at - 1
        return at

    def _take_bracket(self, char: str) -> bool:
        """Opens or closes an object or array. Returns whether the character is a bracket that may stand here."""
        if char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            return len(self._closers) <= MAX_DEPTH
        return bool(self._closers) and self._closers.pop() == char
