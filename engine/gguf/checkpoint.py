"""GgufCheckpoint: a GGUF file, read as if it were a checkpoint folder in Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from jamba_server.engine.gguf.reader import GgufFile, read_gguf
from jamba_server.engine.gguf.settings import read_settings
from jamba_server.engine.gguf.stored import stored_matrices
from jamba_server.engine.gguf.tokenizer import tokenizer_config_json, tokenizer_json
from jamba_server.engine.gguf.vocabulary import Vocabulary
from jamba_server.engine.quantization.blocks import StoredMatrix

CONFIG: Final = "config.json"


class GgufCheckpoint:
    """A model in a GGUF file. `path` is the file, or one of the files if the model is in several pieces. The file is
    parsed when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def file(self) -> GgufFile:
        """The parsed file. Raises CheckpointError if the file cannot be read."""
        return read_gguf(self.path)

    def document(self, name: str, limit: int) -> bytes | None:
        """Returns the content that the file `name` would have in a folder with the same model, or None if such a folder
        would not have the file. `limit` is the largest size of a file in a folder; what is made of a GGUF file is
        bounded by the size of its header. Raises CheckpointError if the GGUF file does not say what is needed."""
        return _DOCUMENTS[name](self.file, Vocabulary(self.file)) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Returns whether the method `document` returns more than None. A file may lack a vocabulary."""
        return name == CONFIG or (name in _DOCUMENTS and Vocabulary(self.file).exists)

    def where(self, name: str) -> Path:
        """Returns the path that an error about the document `name` gives."""
        return self.path

    def stored(self) -> Mapping[str, StoredMatrix]:
        """Returns what is stored of the quantised matrices, by the names that their weights have in a folder."""
        return stored_matrices(self.file)


def _config(file: GgufFile, vocabulary: Vocabulary) -> bytes:
    return msgspec.json.encode(read_settings(file, vocabulary))


_DOCUMENTS: Final[Mapping[str, Callable[[GgufFile, Vocabulary], bytes]]] = {
    CONFIG: _config,
    "tokenizer.json": lambda _, vocabulary: tokenizer_json(vocabulary),
    "tokenizer_config.json": lambda _, vocabulary: tokenizer_config_json(vocabulary),
}
