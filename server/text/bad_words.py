"""Words that a reply must not have, as sequences of token ids."""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.server.text.tokenizer import Tokenizer


def bad_word_tokens(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, without spaces before it, at the beginning of a text and after a space.

    vLLM, whose field this is, drops the second where it has another number of tokens than the first. Then " hello" as
    one token passes where "hello" is two, so we keep both. A reply can still spell a word with other tokens.
    """
    texts = [prefix + word.lstrip(" ") for word in words for prefix in ("", " ")]
    return tuple(dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts))
