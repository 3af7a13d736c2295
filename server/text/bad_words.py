"""Encodes the words that a reply must not contain as sequences of token ids."""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.server.text.tokenizer import Tokenizer


def bad_word_tokens(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns two sequences of token ids for each word: the word as encoded at the beginning of a text, and as encoded
    after a space.

    Spaces at the beginning of a word are dropped. vLLM, which introduced the field `bad_words`, drops the ids after a
    space if their number differs from the number at the beginning. It would let " hello" pass if that is one token and
    "hello" is two, so both lists of ids are kept here. A reply can still spell a word with other tokens.
    """
    texts = [prefix + word.lstrip(" ") for word in words for prefix in ("", " ")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts))
