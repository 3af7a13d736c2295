"""Turns token ids into text while a reply is being generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from jamba_server.server.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes a stream of token ids and returns only complete characters.

    The concatenated text does not depend on how the ids are divided among calls of `push`. Python's incremental UTF-8
    decoder replaces invalid bytes, and an unfinished character at the end, by U+FFFD. `strip_leading_space` drops one
    space at the start of the text: Jamba 1.5 to 1.7 begin a reply with the space that their template puts after a role
    token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, strip_leading_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._space_is_due = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Appends the token ids `ids` and returns the characters that they complete. Keeps the bytes of an unfinished
        character for the next call."""
        tokenizer = self._tokenizer
        kept = (id for id in ids if not (self._skip_special_tokens and tokenizer.is_special(id)))
        return self._strip(self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept))))

    def finish(self) -> str:
        """Ends the text. Returns U+FFFD if a character is unfinished, otherwise an empty string."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._space_is_due and text:
            self._space_is_due = False
            return text.removeprefix(" ")
        return text
