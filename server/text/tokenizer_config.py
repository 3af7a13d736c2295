"""Reads tokenizer_config.json, which names the special tokens and, in many checkpoints, has the chat template."""

from __future__ import annotations

from pathlib import Path

import msgspec

from jamba_server.engine.checkpoint import open_checkpoint
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.files import MAX_BYTES


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class TokenizerConfig(msgspec.Struct, frozen=True):
    """The keys of tokenizer_config.json that this server reads.

    The other keys (class names, lengths, flags) are for other libraries and are ignored.
    """

    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    chat_template: str | list[NamedTemplate] | None = None

    def named_tokens(self) -> dict[str, str]:
        """Returns the special tokens that the file names, such as {"bos_token": "<|startoftext|>"}."""
        tokens = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }
        return {
            name: token.content if isinstance(token, _AddedToken) else token
            for name, token in tokens.items()
            if token is not None
        }


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Reads tokenizer_config.json in a checkpoint's folder.

    If the folder has no such file, the result names no token and has no chat template. Raises CheckpointError if
    the file cannot be read.
    """
    checkpoint, name = open_checkpoint(folder), "tokenizer_config.json"
    path = checkpoint.where(name)
    if (data := checkpoint.document(name, MAX_BYTES)) is None:
        return TokenizerConfig()
    try:
        return msgspec.json.decode(data, type=TokenizerConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
