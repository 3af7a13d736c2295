"""Finds the safetensors files of a checkpoint folder and reads their headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from safetensors import SafetensorError, safe_open

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.files import read_object

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_OTHER_FORMATS: Final = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
_NAMES_SHOWN: Final = 3  # an error lists at most this many tensor names, because a wrong checkpoint may have thousands
_SLICE: Final = 4 << 20  # two tensors are compared in pieces of this many bytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. It is stored between the byte offsets `start` (inclusive) and `end` (exclusive) of the file.
    `dtype` is the name that safetensors uses, for example "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def equals(self, other: StoredTensor) -> bool:
        """Returns whether both tensors have the same dtype, shape and bytes. Stops reading at the first piece in which
        the bytes differ."""
        if (self.dtype, self.shape, self.end - self.start) != (other.dtype, other.shape, other.end - other.start):
            return False
        with self.path.open("rb") as mine, other.path.open("rb") as theirs:
            mine.seek(self.start)
            theirs.seek(other.start)
            return all(mine.read(size) == theirs.read(size) for size in _slices(self.end - self.start))


def _slices(size: int) -> Iterable[int]:
    return (min(_SLICE, size - start) for start in range(0, size, _SLICE))


def weight_files(folder: Path) -> list[Path]:
    """Returns model.safetensors if it exists, else the files that the index file names, as transformers does. Raises
    CheckpointError if neither model.safetensors nor the index file exists."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder / INDEX_FILE)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS) if folder.is_dir() else []
    beside = f"; {listed(found)} cannot be loaded: {_remedy(found)}" if found else ""
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{beside}.")


def _remedy(found: list[str]) -> str:
    if any(name.endswith(".safetensors") for name in found):
        return f"{INDEX_FILE} must say which of them make up the model; finish the download"
    if any(name.endswith(".gguf") for name in found):
        return "give the path of the GGUF file instead of the folder"
    if any(name.endswith(".onnx") for name in found):
        return "serve the original checkpoint in safetensors format instead"
    return "convert them to safetensors (transformers: from_pretrained, then save_pretrained)"


def _shards(index: Path) -> list[Path]:
    weight_map = _weight_map(index)
    files = list(cast(dict[str, Any], weight_map).values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise CheckpointError(f"{index}: weight_map must map tensor names to names of files in the same folder.")
    paths = [index.parent / name for name in sorted(set(files))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{index.parent} lacks {listed(missing)}, named in {index.name}; finish the download.")
    return paths


def _weight_map(index: Path) -> object:
    values = read_object(index) or {}
    if "weight_map" not in values:
        raise CheckpointError(f"{index} cannot be read as an index of shards: it has no weight_map.")
    return values["weight_map"]


def names_in_index(folder: Path) -> set[str]:
    if not (folder / INDEX_FILE).is_file():
        return set()
    weight_map = _weight_map(folder / INDEX_FILE)
    return set(cast(dict[str, Any], weight_map)) if isinstance(weight_map, dict) else set()


def headers(folder: Path) -> dict[str, StoredTensor] | None:
    """Returns the tensors of all weight files of a folder, or None if one of the files is missing or incomplete."""
    try:
        return {name: tensor for path in weight_files(folder) for name, tensor in header(path).items()}
    except CheckpointError:
        return None


def files_in_index(folder: Path) -> set[str]:
    """Returns the names of files in the index file of a folder. Returns no names if the file has no index."""
    weight_map = (read_object(folder / INDEX_FILE) or {}).get("weight_map")
    return set(map(str, cast(dict[str, Any], weight_map).values())) if isinstance(weight_map, dict) else set()


def header(path: Path) -> dict[str, StoredTensor]:
    """Returns a map from the name of each tensor in one file to its dtype, shape and byte offsets, as the header of the
    file lists them. Raises CheckpointError if the file is incomplete."""
    try:
        # `safe_open` checks the header, and checks that the file has the size that the header implies.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            return _read_header(path, file)
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error


def _read_header(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    size = int.from_bytes(file.read(8), "little")
    entries = cast(dict[str, Any], json.loads(file.read(size)))
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), *(8 + size + offset for offset in entry["data_offsets"])
        )
        for name, entry in entries.items()
    }


def incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a complete safetensors file ({path.stat().st_size:,} bytes; {error}); download it again."
    )


def listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
