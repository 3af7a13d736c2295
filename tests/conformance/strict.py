"""Compares what the server sends with the types of the official clients, to the letter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

# Fields of replies that OpenAI's classes lack. docs/api.md has each of them.
EXTRA_FIELDS = frozenset(
    {
        "store",
        "session",
        "jamba_cache",
        "name",  # a function's name in the event at the end of its arguments; earlier versions of the client require it
        "bytes",  # the bytes of a token in the log-probabilities of a response's events
        "stop_reason",
        "reasoning",
        "reasoning_content",
        "token_ids",
        "prompt_token_ids",
        "prompt_logprobs",
        "timings",
        "root",
        "max_model_len",
        "demonstration",
        "description",
        "prompt_tokens_details",  # of embeddings
    }
)
API_PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")

_adapter = cache(TypeAdapter[Any])  # making an adapter of OpenAI's events takes a second


def check(kind: Any, text: str | bytes) -> None:
    """Checks that JSON text is valid for a client's type, without conversions. Fields that the type lacks must be in
    EXTRA_FIELDS."""
    unknown = set(_unknown(_adapter(kind).validate_json(text, strict=True))) - EXTRA_FIELDS
    assert not unknown, f"{unknown} in {text!r}"


def _unknown(value: object) -> Iterator[str]:
    match value:
        case list():
            for item in value:
                yield from _unknown(item)
        case BaseModel():
            yield from value.model_extra or ()
            for name in type(value).model_fields:
                yield from _unknown(getattr(value, name))
        case _:
            pass
