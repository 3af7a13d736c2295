"""Telling a template's special tokens from the same characters in what a client sent.

A chat template makes one string out of its own text and the client's, and special tokens are only characters in it.
So before rendering, every special token inside the client's strings is broken by a mark; after rendering, the text is
split at the special tokens that are still whole, which are the template's own; last, the marks are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jamba_server.engine.errors import CheckpointError

# Noncharacters of Unicode. Should a client send the first one itself, it is rendered as _OWN.
MARKS = MARK, _SPLIT, _LITERAL = "\ufdd0", "\ufdd1", "\ufdd2"
_BREAK = MARK + _SPLIT
_OWN = MARK + _LITERAL
_MARKED = re.compile(f"{MARK}[{_SPLIT}{_LITERAL}]?")


class SpecialText:
    """The special tokens of one tokenizer, as text. Linear in the text, however many tokens there are."""

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
        """A copy of a JSON value with every special token in its strings (and keys) broken."""
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
        # An end such as "<|eo" could become a special token with the text that the template puts behind it.
        for size in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return text + _BREAK
        return text

    def split(self, rendered: str) -> list[str]:
        """Ordinary text at even places, special tokens at odd ones; joined they are `rendered`, marks included."""
        return self._tokens.split(rendered) if self._tokens is not None else [rendered]


def restore(text: str) -> str:
    """Takes the marks out: what the client and the template wrote."""
    return _MARKED.sub(lambda match: MARK if match[0] == _OWN else "", text)


def _trie(words: Iterable[str]) -> str:
    """A regular expression for the longest of `words` at a place; unlike an alternation it never tries one by one."""
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
