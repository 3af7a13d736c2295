"""Writes small parts of grammars in llguidance's variant of the notation of Lark, a parser library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass


def literal(text: str) -> str:
    """Returns a string literal for a grammar, which matches exactly `text`. In Lark's notation, string literals have
    the escapes of JSON."""
    return json.dumps(text)


def regex(pattern: str) -> str:
    """Returns a regular expression in the notation of a grammar, between slashes. The argument has the syntax of Rust's
    crate `regex-syntax`."""
    escaped = pattern.replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
    return f"/{escaped or '(?:)'}/"


def quoted(text: str) -> str:
    """Returns a regular expression in Rust's syntax that matches exactly `text`."""
    return re.sub(r"[^0-9A-Za-z_ ]", lambda match: f"\\x{{{ord(match[0]):X}}}", text)


def text_without(*tags: str) -> str:
    """Returns a terminal symbol of a grammar that matches every text which contains none of the given tags."""
    terminal = "/(?s:.*)/"
    for tag in tags:
        terminal += f" & ~{regex(f'(?s:.*){quoted(tag)}(?s:.*)')}"
    return terminal


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag that a model writes, such as "<tool_call>". `token_id` is the id of the tag's token, or None if the
    vocabulary has no such token and the model writes the tag with several ordinary tokens.

    In a grammar of llguidance, ordinary text never matches the token of a tag, so the tag must be named by its token
    id.
    """

    text: str
    token_id: int | None

    @classmethod
    def of(cls, text: str, token_ids: Mapping[str, int]) -> Tag:
        return cls(text, token_ids.get(text))

    @property
    def symbol(self) -> str:
        return literal(self.text) if self.token_id is None else f"<[{self.token_id}]>"
