"""Finds the end of a JSON object or array in a text that arrives in pieces."""

from __future__ import annotations

import re

MAX_DEPTH = 128  # maximum nesting of objects and arrays; a more deeply nested value counts as invalid JSON

_CLOSERS = {"{": "}", "[": "]"}
# Matches the characters that matter inside a JSON string: the closing quote, a backslash, and control characters, which
# JSON does not allow there.
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
# Matches the characters that matter outside of JSON strings: quotes, brackets, and all characters that do not occur in
# numbers, white space or the words true, false and null.
_OUTSIDE = re.compile(r"[^ \t\r\n:,0-9+\-.Eaeflnrstu]")


class JsonScanner:
    """Follows the strings and brackets of one JSON object or array.

    The scanner finds where the value ends, and it finds most errors as soon as they appear. Other errors are found only
    when the complete value is decoded. The time is linear in the length of the text. The attribute `broken` is true if
    the text so far cannot be the beginning of valid JSON, or if it is nested more deeply than MAX_DEPTH. The method
    `lift_limit` removes this limit.
    """

    def __init__(self) -> None:
        self.broken = False
        self._max_depth: int | None = MAX_DEPTH
        self._closers: list[str] = []  # the closing brackets that must still come, the innermost bracket last
        self._in_string = False
        self._escaped = False  # whether the last character was a backslash that escapes the next one

    def lift_limit(self) -> None:
        """Removes the limit on the nesting. The caller knows from another source that the value is valid JSON."""
        self._max_depth = None

    @property
    def depth(self) -> int:
        """Returns the number of objects and arrays that are open. The number is 0 after the end of the value."""
        return len(self._closers)

    def step(self, text: str, start: int) -> int:
        """Reads `text` from the offset `start` up to and including the next bracket that is not in a string, or to the
        end of `text` if there is no such bracket. Returns the offset after the last character that was read.

        If a character is not valid JSON, the reading stops before that character.
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
        """Records the beginning or end of an object or array. Returns false if the character is not a bracket that is
        allowed here."""
        if char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            return self._max_depth is None or len(self._closers) <= self._max_depth
        return bool(self._closers) and self._closers.pop() == char
