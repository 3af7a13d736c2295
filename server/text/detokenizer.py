"""Turns token ids into text while a reply is being generated."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable

from jamba_server.server.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes a stream of token ids and returns only complete characters.

    The concatenated text does not depend on how the ids are divided among calls of `push`. Python's incremental UTF-8
    decoder replaces invalid bytes, and an unfinished character at the end, by U+FFFD. `skip_special_tokens` leaves out
    special tokens, except those in `kept_tokens`. `strip_leading_space` drops one space at the start of the text: Jamba
    1.5 to 1.7 begin a reply with the space that their template puts after a role token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        kept_tokens: Collection[int] = (),
        strip_leading_space: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._kept_tokens = kept_tokens
        self._space_is_due = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Appends the token ids `ids` and returns the characters that they complete. Keeps the bytes of an unfinished
        character for the next call."""
        shown = (id for id in ids if not self._is_skipped(id))
        return self._strip(self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown))))

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip_special_tokens and self._tokenizer.is_special(token_id) and token_id not in self._kept_tokens

    def finish(self) -> str:
        """Ends the text. Returns U+FFFD if a character is unfinished, otherwise an empty string."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._space_is_due and text:
            self._space_is_due = False
            return text.removeprefix(" ")
        return text
