"""Writes the small parts of grammars in llguidance's form of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass


def literal(text: str) -> str:
    """Returns a string of a grammar that matches exactly `text`. Lark's escapes are those of JSON."""
    return json.dumps(text)


def regex(pattern: str) -> str:
    """Returns a regular expression of a grammar. The argument has the syntax of Rust's crate `regex-syntax`."""
    escaped = pattern.replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
    return f"/{escaped or '(?:)'}/"


def quoted(text: str) -> str:
    """Returns a regular expression that matches exactly `text`."""
    return re.sub(r"[^0-9A-Za-z_ ]", lambda match: f"\\x{{{ord(match[0]):X}}}", text)


def text_without(*tags: str) -> str:
    """Returns a terminal for all texts that have none of the given tags in them."""
    terminal = "/(?s:.*)/"
    for tag in tags:
        terminal += f" & ~{regex(f'(?s:.*){quoted(tag)}(?s:.*)')}"
    return terminal


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag that a model writes, such as "<tool_call>". `token_id` is the id of the token that stands for the tag, or
    None if the model writes the tag with ordinary tokens.

    A token of a tag is never a part of ordinary text in a grammar: text stands for ordinary tokens only.
    """

    text: str
    token_id: int | None

    @classmethod
    def of(cls, text: str, token_ids: Mapping[str, int]) -> Tag:
        return cls(text, token_ids.get(text))

    @property
    def symbol(self) -> str:
        return literal(self.text) if self.token_id is None else f"<[{self.token_id}]>"
