"""Converts text to token ids and back, as the tokenizer.json of a checkpoint describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import msgspec
import tokenizers

from jamba_server.engine.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, open_checkpoint, read_text
from jamba_server.engine.errors import CheckpointError, RequestRejected
from jamba_server.server.text.token_bytes import Decoder, bytes_reader
from jamba_server.server.text.tokenizer_config import read_tokenizer_config

# The highest token id allowed. The tokenizer keeps a table with an entry for every number up to the highest token id,
# so a very high id would fill the memory.
_MAX_ID: Final = (1 << 24) - 1
_TAG: Final = re.compile(r"</?[A-Za-z_]+>")


class _EncodeBatch(Protocol):
    def __call__(self, input: list[str], *, add_special_tokens: bool) -> list[tokenizers.Encoding]: ...


class _TokenizerFile(msgspec.Struct, frozen=True):
    decoder: Decoder | None = None


class Tokenizer:
    """Converts between text and token ids. It is immutable once built, so several threads may share it.

    `encode` never parses special tokens: "<|eom|>" in its argument is seven ordinary characters. Ids of special tokens
    come only from `special_tokens` and from the post-processor, which adds BOS. Added tokens that are not special,
    such as `<think>` and `<tool_call>`, are parsed, because they are pieces of text.
    """

    def __init__(self, raw: tokenizers.Tokenizer, decoder: Decoder | None, named_tokens: Mapping[str, str]) -> None:
        self._raw = raw
        self._raw.encode_special_tokens = True
        self._raw.no_truncation()
        self._raw.no_padding()
        self.named_tokens: Mapping[str, str] = MappingProxyType(dict(named_tokens))
        self.special_tokens: Mapping[str, int] = MappingProxyType(self._find_special_tokens())
        self._special_ids = frozenset(self.special_tokens.values())
        self._token_bytes = self._read_vocabulary(decoder)
        self._strips_leading_space = any(step.type == "Strip" for step in (decoder.steps() if decoder else []))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json and the names of special tokens in tokenizer_config.json.

        Raises CheckpointError if a file is missing or cannot be read.
        """
        checkpoint = open_checkpoint(folder)
        path = checkpoint.where(TOKENIZER_FILE)
        if (text := read_text(checkpoint, TOKENIZER_FILE, limit=MAX_TOKENIZER_BYTES)) is None:
            raise CheckpointError(f"{folder} has no tokenizer.json, which this server needs to read and write text.")
        try:
            decoder = msgspec.json.decode(text, type=_TokenizerFile).decoder
            raw = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library `tokenizers` raises the class Exception, not a subclass
            raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}.") from error
        return cls(raw, decoder, read_tokenizer_config(folder).named_tokens())

    def _find_special_tokens(self) -> dict[str, int]:
        """Returns a mapping from the texts of special tokens to their token ids. A token is special if tokenizer.json
        marks it so or tokenizer_config.json names it."""
        special = {token.content: id for id, token in self._raw.get_added_tokens_decoder().items() if token.special}
        for token in self._raw.get_added_tokens_decoder().values():
            if token.special and (token.lstrip or token.rstrip or token.single_word):
                raise CheckpointError(
                    f"tokenizer.json: special token {token.content!r} has lstrip, rstrip or single_word set; this "
                    "server reads special tokens only as they are written."
                )
        for name, token in self.named_tokens.items():
            token_id = self._raw.token_to_id(token)
            if token_id is None:
                raise CheckpointError(f"tokenizer_config.json: {name} {token!r} is not in tokenizer.json.")
            special[token] = token_id
        return special

    def _read_vocabulary(self, decoder: Decoder | None) -> tuple[bytes, ...]:
        """Returns a table from token id to the bytes of the token's text. For a token id that is not in the vocabulary,
        the table has b""."""
        to_bytes = bytes_reader(decoder)
        vocabulary = self._raw.get_vocab(with_added_tokens=True)
        highest = max(vocabulary.values(), default=-1)
        if highest > _MAX_ID:
            raise CheckpointError(f"tokenizer.json: the highest token id is {highest}; at most {_MAX_ID} is expected.")
        table = [b""] * (highest + 1)
        for spelling, token_id in vocabulary.items():
            table[token_id] = to_bytes(spelling)
        return tuple(table)

    @property
    def tags(self) -> Mapping[str, int]:
        """Returns the vocabulary's tags, such as "<tool_call>", with their token ids. Control tokens such as "<|eom|>"
        do not count as tags."""
        added = self._raw.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if _TAG.fullmatch(token.content)}

    def to_json(self) -> str:
        """Returns the text of a tokenizer.json for this tokenizer."""
        return self._raw.to_str()

    @property
    def vocab_size(self) -> int:
        """The highest token id plus one. A model's embedding may have more rows than that; the token ids of the
        additional rows have no text."""
        return len(self._token_bytes)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self.special_tokens[token]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`.

        With `add_special_tokens` they begin with BOS if the checkpoint's post-processor adds it.
        """
        # encode_batch_fast does not compute the offsets of tokens in the text, which are not needed here.
        return self._encode(self._raw.encode_batch_fast, text, add_special_tokens).ids

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Returns the token ids of a pair of texts, joined by special tokens as the checkpoint's post-processor says.
        `tokenizer(first, second)` of transformers returns the same."""
        try:
            [encoding] = self._raw.encode_batch_fast([(first, second)], add_special_tokens=True)
        except TypeError as error:
            raise RequestRejected("The text holds half of a surrogate pair, which is not valid Unicode.") from error
        return encoding.ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of `text` without BOS. For each token, also returns the offset in characters at which
        the token ends in `text`.

        If several byte tokens form one character, each of them ends where that character ends.
        """
        encoding = self._encode(self._raw.encode_batch, text, False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encode(self, encode: _EncodeBatch, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        """Encodes one text as a batch of one text, because the library `tokenizers` releases the GIL for batches.

        The library's method for a single text holds the GIL, which would block the event loop.
        """
        try:
            [encoding] = encode([text], add_special_tokens=add_special_tokens)
        except TypeError as error:  # the library raises TypeError for a text that has no UTF-8 form
            raise RequestRejected("The text holds half of a surrogate pair, which is not valid Unicode.") from error
        return encoding

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of a complete sequence of token ids. (While a reply is being generated, the class
        Detokenizer is used.)

        Invalid UTF-8 becomes U+FFFD.
        """
        data = b"".join(self.token_bytes(id) for id in ids if not (skip_special_tokens and self.is_special(id)))
        text = data.decode(errors="replace")
        return text.removeprefix(" ") if self._strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def token_text(self, token_id: int) -> str:
        """Returns the text of a single token, as the field logprobs of a reply shows it. The bytes of an incomplete
        character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids
