"""Tells special tokens written by a chat template apart from the same characters in a client's strings.

A chat template renders its own text and the client's text into one string, in which special tokens are only characters.
Three steps keep the two apart. Before rendering, a mark is inserted into every special token inside the client's
strings. After rendering, the text is split at the special tokens that contain no mark, which are the template's own.
Last, the marks are removed.

Further marks can be inserted at chosen positions in messages. After rendering, they show where in the prompt these
positions are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jamba_server.engine.errors import CheckpointError

# The marks are noncharacters of Unicode, which ordinary text does not contain. If a client's string contains the
# character MARK, that character is replaced by _OWN. Later the function `restore` turns _OWN back into MARK. So every
# other MARK in a rendered text was inserted by this server.
MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
MARK, _SPLIT, _LITERAL, *_PLACES = MARKS
_BREAK = MARK + _SPLIT
_OWN = MARK + _LITERAL
_MARKED = re.compile(f"{MARK}[{_SPLIT}-{MARKS[-1]}]?")
_PLACE_MARKED = re.compile(f"{MARK}([{_PLACES[0]}-{_PLACES[-1]}])")
MAX_PLACES = len(_PLACES)  # 29


class SpecialText:
    """Finds the special tokens of one tokenizer in a text.

    The time is linear in the length of the text and does not grow with the number of special tokens.
    """

    def __init__(self, special_tokens: Iterable[str]) -> None:
        tokens = sorted(special_tokens)
        for token in tokens:
            if len(token) < 2 or any(mark in token for mark in MARKS):
                raise CheckpointError(f"Special token {token!r} cannot be told from ordinary text.")
        self._tokens = re.compile(f"({_trie(tokens)})") if tokens else None
        self._first_chars = re.compile(f"(?={_trie(tokens)})(.)", re.DOTALL) if tokens else None
        self._prefixes = frozenset(token[:size] for token in tokens for size in range(1, len(token)))
        self._longest_prefix = max(map(len, self._prefixes), default=0)

    def protect(self, value: object) -> object:
        """Returns a copy of a JSON value in which every special token in a string or a key contains a mark."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.protect(item) for item in value]
        return value

    def _protect_text(self, text: str) -> str:
        text = text.replace(MARK, _OWN)
        if self._first_chars is not None:
            text = self._first_chars.sub(rf"\1{_BREAK}", text)
        # The text may end with the beginning of a special token, such as "<|eo". The template's next characters could
        # complete that token. A mark at the end of the text prevents that.
        for size in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return text + _BREAK
        return text

    def split(self, rendered: str) -> list[str]:
        """Splits `rendered` at special tokens. Items with even index are ordinary text, items with odd index are
        special tokens.

        The joined items equal `rendered`, including its marks.
        """
        return self._tokens.split(rendered) if self._tokens is not None else [rendered]


def place_mark(number: int) -> str:
    """Returns the mark with a number below MAX_PLACES. The mark can be inserted into a text that `protect` has
    returned, to find its position in the rendered prompt."""
    return MARK + _PLACES[number]


def take_places(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """Removes from a rendered prompt the marks that `place_mark` has made, and returns the text without them. Also
    returns, for each mark in the order of the text, its number and its offset in the returned text, in characters."""
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    start = length = 0
    for found in _PLACE_MARKED.finditer(rendered):
        pieces.append(rendered[start : found.start()])
        length += found.start() - start
        places.append((_PLACES.index(found[1]), length))
        start = found.end()
    pieces.append(rendered[start:])
    return "".join(pieces), places


def restore(text: str) -> str:
    """Removes the marks from `text`. The result has only the characters that the client and the template wrote."""
    return _MARKED.sub(lambda match: MARK if match[0] == _OWN else "", text)


def _trie(words: Iterable[str]) -> str:
    """Returns a regular expression that matches each of `words`. If several words match at one position, the longest
    word is matched.

    The words form a trie, so the matcher follows shared prefixes once. A plain alternation would try word after word.
    """
    branches: dict[str, list[str]] = {}
    optional = False
    for word in words:
        if word:
            branches.setdefault(word[0], []).append(word[1:])
        else:
            optional = True
    if not branches:
        return ""
    body = "|".join(re.escape(char) + _trie(rest) for char, rest in branches.items())
    return f"(?:{body})?" if optional else f"(?:{body})"
