"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from jamba_server.server.text.tokenizer import Tokenizer


class Detokenizer:
    """Emits whole characters only; however the ids are cut, the pieces join to the same text.

    A byte sequence that turns out to be invalid UTF-8 becomes U+FFFD by the rule of Python's incremental decoder, and
    so does what is left over at the end. `strip_leading_space` drops one space at the very start: models of the
    family 1.5 to 1.7 begin a reply with the space that their template puts after a role token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, strip_leading_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._space_is_due = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete; the bytes of an unfinished one wait for the next call."""
        tokenizer = self._tokenizer
        kept = (id for id in ids if not (self._skip_special_tokens and tokenizer.is_special(id)))
        return self._strip(self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept))))

    def finish(self) -> str:
        """The tail: U+FFFD for an unfinished character."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._space_is_due and text:
            self._space_is_due = False
            return text.removeprefix(" ")
        return text
