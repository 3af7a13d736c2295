"""Reads the vocabulary of a GGUF file: its pieces, their types and scores, and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.reader import GgufFile, StringArray, value_shown

# The types of pieces. A control piece is never made of ordinary text, and a byte piece stands for one byte.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_PREFIX: Final = "tokenizer.ggml."
_KIND: Final = "llama"  # the name that llama.cpp gives to vocabularies of SentencePiece
# Where a vocabulary has these pieces, they end a reply. Files name one of them as the end token, while the
# generation_config.json of the same model names two.
_STOPS: Final = (b"<|endoftext|>", b"<|im_end|>", b"<|eom|>")

_NO_PIECES: Final = StringArray(b"", np.empty(0, np.int64))
_MAX_ID: Final = 1 << 24
_MAX_TEMPLATE: Final = 1 << 20  # characters


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file. Values are read when they are asked for. Each property raises CheckpointError if
    its value in the file is missing or wrong; the error names the key."""

    file: GgufFile

    def refusal(self, key: str, rule: str) -> CheckpointError:
        value = value_shown(self.file.metadata.get(key))
        return CheckpointError(f"{self.file.path}: {key} is {value}; {rule}.")

    @cached_property
    def _pieces(self) -> StringArray:
        key = f"{_PREFIX}tokens"
        if not isinstance(pieces := self.file.metadata.get(key, _NO_PIECES), StringArray):
            raise self.refusal(key, "an array of strings is expected")
        return pieces

    @property
    def exists(self) -> bool:
        """Whether the file has a vocabulary."""
        return len(self._pieces) > 0

    @cached_property
    def pieces(self) -> list[str]:
        """The pieces by their ids. All pieces differ."""
        kind = self.file.metadata.get(f"{_PREFIX}model")
        if kind != _KIND:
            raise self.refusal(f"{_PREFIX}model", f'this server reads vocabularies of the kind "{_KIND}"')
        try:
            pieces = [self._pieces[i].decode() for i in range(len(self._pieces))]
        except UnicodeDecodeError as error:
            raise self.refusal(f"{_PREFIX}tokens", f"a piece is not UTF-8: {error}") from None
        if len(set(pieces)) < len(pieces):
            twice = next(piece for id, piece in enumerate(pieces) if pieces.index(piece) < id)
            raise self.refusal(f"{_PREFIX}tokens", f"the piece {shown(twice)} is there twice")
        return pieces

    @cached_property
    def types(self) -> list[int]:
        """The types of the pieces by their ids."""
        key = f"{_PREFIX}token_type"
        values = self.file.metadata.get(key)
        if values is None:
            return [NORMAL] * len(self._pieces)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or len(values) != len(self._pieces):
            raise self.refusal(key, f"a whole number for each of {len(self._pieces)} pieces is expected")
        return values.tolist()

    @cached_property
    def scores(self) -> list[float]:
        """The scores of the pieces by their ids. The score says how early a piece is made of two others."""
        key = f"{_PREFIX}scores"
        values = self.file.metadata.get(key)
        if values is None:
            return [0.0] * len(self._pieces)
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or len(values) != len(self._pieces):
            raise self.refusal(key, f"a number for each of {len(self._pieces)} pieces is expected")
        if not np.isfinite(values).all():
            raise self.refusal(key, "finite numbers are expected")
        return values.tolist()

    def _id(self, name: str) -> int | None:
        key = f"{_PREFIX}{name}_token_id"
        if (value := self.file.metadata.get(key)) is None:
            return None
        most = len(self._pieces) if self.exists else _MAX_ID
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
            raise self.refusal(key, f"a token id from 0 to {most - 1} is expected")
        return value

    def flag(self, name: str, default: bool) -> bool:
        key = f"{_PREFIX}{name}"
        if not isinstance(value := self.file.metadata.get(key, default), bool):
            raise self.refusal(key, "true or false is expected")
        return value

    @property
    def bos(self) -> int | None:
        return self._id("bos")

    @property
    def eos(self) -> int | None:
        return self._id("eos")

    @property
    def pad(self) -> int | None:
        return self._id("padding")

    @property
    def unknown(self) -> int | None:
        return self._id("unknown")

    @property
    def named_stops(self) -> tuple[int, ...]:
        """The ids of the tokens of which the metadata says that they end a reply."""
        return tuple(id for name in ("eos", "eot", "eom") if (id := self._id(name)) is not None)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The ids of all tokens that end a reply, without repetition."""
        found = {piece: id for id in range(len(self._pieces)) if (piece := self._pieces[id]) in _STOPS}
        return tuple(dict.fromkeys([*self.named_stops, *(found[piece] for piece in _STOPS if piece in found)]))

    def special_names(self) -> Mapping[str, str]:
        """Returns the pieces of the special tokens by the keys of a tokenizer_config.json."""
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unknown, "pad_token": self.pad}
        return {key: self._pieces[id].decode(errors="replace") for key, id in ids.items() if id is not None}

    @property
    def template(self) -> str | None:
        """The chat template, or None if the file has none."""
        key = "tokenizer.chat_template"
        if not isinstance(value := self.file.metadata.get(key), str | None):
            raise self.refusal(key, "a string is expected")
        if value is not None and len(value) > _MAX_TEMPLATE:
            raise CheckpointError(
                f"{self.file.path}: {key} has {len(value):,} characters; at most {_MAX_TEMPLATE:,} are expected."
            )
        return value
