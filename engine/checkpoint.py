"""Opens a checkpoint: a folder in Hugging Face format, or a file that holds the same in another format.

The rest of the server asks a checkpoint for documents, which are the small files of a folder: config.json,
tokenizer.json and so on. A format other than the folder is added to `_FORMATS` with the class that translates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from jamba_server.engine.files import MAX_BYTES, parse_object, parse_text, read_bytes
from jamba_server.engine.gguf.recognition import is_gguf
from jamba_server.engine.quantization.blocks import StoredMatrix

TOKENIZER_FILE: Final = "tokenizer.json"
MAX_TOKENIZER_BYTES: Final = 128 << 20  # limit of the size of a tokenizer.json; one with 256 thousand tokens has 33 MB


class Checkpoint(Protocol):
    """A model on disk."""

    path: Path

    def document(self, name: str, limit: int) -> bytes | None:
        """Returns the content of the small file `name`, or None if there is no such file. Raises CheckpointError if the
        file cannot be read or has more than `limit` bytes."""
        ...

    def has(self, name: str) -> bool:
        """Returns whether there is a document `name`."""
        ...

    def where(self, name: str) -> Path:
        """Returns the path that an error about the document `name` gives."""
        ...

    def stored(self) -> Mapping[str, StoredMatrix]:
        """Returns what is stored of the matrices that are stored in blocks of integers, by the names that their weights
        have in a folder."""
        ...


class Folder:
    """A folder in Hugging Face format. It may lack any file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def document(self, name: str, limit: int) -> bytes | None:
        return read_bytes(self.where(name), limit=limit)

    def has(self, name: str) -> bool:
        return self.where(name).is_file()

    def where(self, name: str) -> Path:
        return self.path / name

    def stored(self) -> Mapping[str, StoredMatrix]:
        return {}


def _open_gguf(path: Path) -> Checkpoint:
    # This module imports numpy, which would delay the first line that a command prints.
    from jamba_server.engine.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)


_FORMATS: Final[tuple[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]], ...]] = ((is_gguf, _open_gguf),)


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint at `path`. Nothing is read of it but the few bytes that tell its format."""
    return next((make(path) for recognises, make in _FORMATS if recognises(path)), Folder(path))


def read_text(checkpoint: Checkpoint, name: str, *, limit: int = MAX_BYTES) -> str | None:
    """Returns the document `name` decoded from UTF-8, or None if there is no such document. Raises CheckpointError if
    the document cannot be read."""
    data = checkpoint.document(name, limit)
    return None if data is None else parse_text(checkpoint.where(name), data)


def read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """Returns the JSON object in the document `name`, or None if there is no such document. Raises CheckpointError if
    the document cannot be read or holds no JSON object."""
    data = checkpoint.document(name, MAX_BYTES)
    return None if data is None else parse_object(checkpoint.where(name), data)
