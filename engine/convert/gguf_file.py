"""Writes a GGUF file."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from jamba_server.engine.convert.encode import type_number
from jamba_server.engine.gguf.recognition import MAGIC

_ALIGNMENT: Final = 32
_VERSION: Final = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor to write. `shape` ends with the dimension whose neighbours are adjacent in memory. `kind` is the name of
    a type."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: bytes


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[Encoded]) -> None:
    """Writes the file `path`. Each tensor is written as soon as it comes; the header, which lists them all, is written
    at the end. A file of which a part could not be written is removed."""
    data_path, partial = path.with_name(f"{path.name}.data"), path.with_name(f"{path.name}.partial")
    try:
        with data_path.open("w+b") as data, partial.open("wb") as file:
            entries = [_write_tensor(data, tensor) for tensor in tensors]
            file.write(MAGIC + struct.pack("<IQQ", _VERSION, len(entries), len(metadata)))
            for key, value in metadata.items():
                file.write(_string(key) + _value(value))
            file.write(b"".join(entries))
            file.write(bytes(-file.tell() % _ALIGNMENT))
            data.seek(0)
            shutil.copyfileobj(data, file, 16 << 20)
        partial.rename(path)
    finally:
        data_path.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _write_tensor(data: BinaryIO, tensor: Encoded) -> bytes:
    """Writes the bytes of a tensor and returns its entry in the header."""
    offset = data.tell()
    data.write(tensor.data + bytes(-len(tensor.data) % _ALIGNMENT))
    dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _string(tensor.name) + dimensions + struct.pack("<IQ", type_number(tensor.kind), offset)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Returns the type and the bytes of a value of the metadata."""
    if isinstance(value, list):
        elements = [_value(element) for element in cast(list[Any], value)]
        # Every element begins with its type, which an array has only once.
        # llama.cpp refuses a file whose types of tokens are not signed.
        kind = struct.pack("<I", _INT32) if isinstance(value[0], int) else elements[0][:4]
        return struct.pack("<I", _ARRAY) + kind + struct.pack("<Q", len(elements)) + _joined(elements)
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case _:
            return struct.pack("<I", _STRING) + _string(value)


def _joined(elements: Iterable[bytes]) -> bytes:
    return b"".join(element[4:] for element in elements)
