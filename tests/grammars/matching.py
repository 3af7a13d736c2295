"""Follows grammars with a tokenizer of bytes: does a grammar take a text, and which texts does it make at random?"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import llguidance
import numpy as np

from tools.schema_suite import EOS, TAGS, ByteTokenizer, byte_tokenizer

MAX_ORDERS = 720  # the number of orders of an object with six properties
CLOSING = 5.0  # what is added to the logits of tokens that close something
_TAG_NAMES = {token_id: tag for tag, token_id in TAGS.items()}


def matcher(grammar: str) -> llguidance.LLMatcher:
    made = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(follower: llguidance.LLMatcher, text: str) -> bool:
    """Whether the grammar takes exactly this text. A tag in it is one token."""
    return accepts_tokens(follower, tokens(text))


def accepts_tokens(follower: llguidance.LLMatcher, token_ids: list[int]) -> bool:
    follower.reset()
    return follower.try_consume_tokens(token_ids) == len(token_ids) and follower.is_accepting()


def tokens(text: str) -> list[int]:
    token_ids: list[int] = []
    while text:
        tag = next((tag for tag in TAGS if text.startswith(tag)), None)
        if tag is not None:
            token_ids.append(TAGS[tag])
            text = text[len(tag) :]
        else:
            token_ids += text[0].encode("utf-8", "surrogatepass")
            text = text[1:]
    return token_ids


def compact(value: Any) -> str:
    """JSON without optional white space; a number without a fraction is written as a whole number, as in RFC 8785."""
    return json.dumps(_whole(value), ensure_ascii=False, separators=(",", ":"))


def _whole(value: Any) -> Any:
    match value:
        case float() if math.isfinite(value) and value.is_integer():
            return int(value)
        case list():
            return [_whole(item) for item in cast("list[Any]", value)]
        case dict():
            return {key: _whole(item) for key, item in cast("dict[str, Any]", value).items()}
        case _:
            return value


def orders(value: Any) -> Iterator[Any]:
    """The value with its properties in every order, up to a limit."""
    return itertools.islice(_orders(value), MAX_ORDERS)


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        yield from map(list, itertools.product(*[list(_orders(item)) for item in cast("list[Any]", value)]))
    elif isinstance(value, dict):
        properties = cast("Mapping[str, Any]", value)
        for keys in itertools.permutations(properties):
            for items in itertools.product(*[list(_orders(properties[key])) for key in keys]):
                yield dict(zip(keys, items, strict=True))
    else:
        yield value


def generated(grammar: str, rng: np.random.Generator, *, limit: int, favoured: Mapping[int, float]) -> str | None:
    """A text that a model with random weights makes under the grammar, or None if it has no end within `limit` tokens.

    `favoured` has what is added to the logits of some tokens.
    """
    follower = matcher(grammar)
    bias = np.zeros(len(ByteTokenizer.tokens))
    for token_id, value in favoured.items():
        bias[token_id] = value
    text = b""
    for _ in range(limit):
        mask = np.unpackbits(np.frombuffer(follower.compute_bitmask(), np.uint8), bitorder="little")[: len(bias)]
        assert not follower.is_error(), follower.get_error()
        allowed = np.flatnonzero(mask)
        token_id = int(allowed[np.argmax(bias[allowed] + rng.gumbel(size=len(allowed)))])
        if token_id == EOS:
            return text.decode()
        text += _TAG_NAMES[token_id].encode() if token_id in _TAG_NAMES else bytes([token_id])
        assert follower.consume_token(token_id)
        if follower.is_stopped():
            return text.decode()
    return None


def closing() -> dict[int, float]:
    """The end token and the characters that close a string, an array, an object."""
    return {EOS: CLOSING} | {ord(character): CLOSING for character in '"]}'}
