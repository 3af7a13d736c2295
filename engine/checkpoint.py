"""Opens a checkpoint, which is either a folder in Hugging Face format or a file in another format, such as GGUF.

The rest of the server reads a checkpoint as if it were a folder: it asks for documents, which are the small files of
such a folder (config.json, tokenizer.json and so on). For any other format, a class makes these documents from the
file. The list `_FORMATS` names these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from jamba_server.engine.files import MAX_BYTES, parse_object, parse_text, read_bytes
from jamba_server.engine.gguf.recognition import is_gguf
from jamba_server.engine.prequantized.settings import find_settings
from jamba_server.engine.quantization import Role
from jamba_server.engine.quantization.blocks import StoredMatrix

if TYPE_CHECKING:
    from jamba_server.engine.prequantized.layout import Layout

TOKENIZER_FILE: Final = "tokenizer.json"
# Maximum size of a tokenizer.json in bytes; the file of a tokenizer with 256 thousand tokens has 33 MB.
MAX_TOKENIZER_BYTES: Final = 128 << 20


class Checkpoint(Protocol):
    """The interface of a model on disk, whatever the format of its files."""

    path: Path

    def document(self, name: str, limit: int) -> bytes | None:
        """Returns the content of the document `name`, such as "config.json", or None if the checkpoint has no such
        document. Raises CheckpointError if the document cannot be read or has more than `limit` bytes."""
        ...

    def has(self, name: str) -> bool:
        """Returns whether the checkpoint has a document `name`, such as "config.json"."""
        ...

    def where(self, name: str) -> Path:
        """Returns the path that error messages about the document `name` mention."""
        ...

    def stored(self) -> Mapping[str, StoredMatrix]:
        """Describes the weight matrices that the file stores as quantised integers with scales. The keys are the names
        that these weights have in a checkpoint of Hugging Face's format."""
        ...


class Folder:
    """A checkpoint that is a folder in Hugging Face format. Any of its files may be missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def document(self, name: str, limit: int) -> bytes | None:
        return read_bytes(self.where(name), limit=limit)

    def has(self, name: str) -> bool:
        return self.where(name).is_file()

    def where(self, name: str) -> Path:
        return self.path / name

    def stored(self) -> Mapping[str, StoredMatrix]:
        layout = self.layout()
        return {} if layout is None else {name: matrix.stored for name, matrix in layout.matrices.items()}

    def expected(
        self, shapes: Iterable[tuple[str, Role, int, int]], names: Collection[str]
    ) -> Mapping[str, StoredMatrix]:
        """Returns what the method `stored` is expected to return once the weight files are there. `shapes` has the
        name, the part of the model, the rows and the inputs of each matrix. `names` are the tensors in the index file,
        or empty if there is none."""
        if find_settings(self.path) is None:
            return {}
        from jamba_server.engine.prequantized.table import expected

        return expected(self.path, shapes, names)

    def layout(self) -> Layout | None:
        """Returns what the weight files hold if another tool has quantised the weights to integers, else None. Raises
        CheckpointError if this server cannot read such weights."""
        if find_settings(self.path) is None:
            return None
        # The import is made only here, because the imported module loads numpy.
        from jamba_server.engine.prequantized.table import open_layout

        return open_layout(self.path)


def _open_gguf(path: Path) -> Checkpoint:
    # The import is made only here, because the imported module loads numpy, which would delay the first line that a
    # command prints.
    from jamba_server.engine.gguf.checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)


_FORMATS: Final[tuple[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]], ...]] = ((is_gguf, _open_gguf),)


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint at `path`. Only the few bytes that show the file's format are read."""
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
