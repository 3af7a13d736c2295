"""Parses GGUF files: a header with metadata and a list of tensors, then the tensors' bytes.

A file may come from an untrusted source. Every count, length and offset is compared with the size of the file before it
is used, so a file can neither make this reader allocate more memory than a few times the size of its header nor read
outside of the file.

Files are read, not memory-mapped: if a mapped file becomes shorter, a read of the lost part ends the process, and the
pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.blocks import OTHER_TYPES, TYPES, BlockType
from jamba_server.engine.gguf.recognition import MAGIC

VERSIONS: Final = (2, 3)
# These limits are far above what published files have, and low enough that a hostile file does no harm.
_MAX_HEADER: Final = 128 << 20  # bytes of metadata and of the list of tensors
_MAX_STRINGS: Final = 1 << 22  # number of strings in an array
_MAX_KEYS: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 17
_MAX_NAME: Final = 1 << 10  # bytes of a key or of the name of a tensor
_MAX_PIECES: Final = 1000
_MAX_DIMENSIONS: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_STEP: Final = 1 << 20  # at least this many bytes of the header are read at a time
_ALIGNMENT: Final = 32  # bytes; used if the file does not say otherwise
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Maps the number of a type of metadata to the format of the struct module.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_KIND_NAMES: Final = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array")
_PIECE: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class StringArray:
    """An array of strings in the metadata. `data` has the strings one after the other, and string i is
    `data[ends[i - 1] : ends[i]]`."""

    data: bytes
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.data[0 if index == 0 else self.ends[index - 1] : self.ends[index]]


Value = bool | int | float | str | StringArray | npt.NDArray[np.generic]
"""A value of the metadata."""


def value_shown(value: Value | None) -> str:
    """Returns a value of the metadata as text for an error message."""
    if isinstance(value, StringArray | np.ndarray):
        return f"an array of {len(value):,} elements"
    return "missing" if value is None else shown(value)


class OpenFile:
    """A file that is open until this object is no longer used. `size` is the number of its bytes when it was opened."""

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises CheckpointError unless `path` is a regular file."""
        self.path = path
        try:
            # O_NONBLOCK: opening a named pipe would otherwise block until another process opens the pipe for writing.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; a GGUF file is expected.")
        self.size = status.st_size

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file. It is closed when this object is no longer used."""
        return self._descriptor

    def read(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from the offset `start`, which lie within the size that the file had when it was opened.
        Raises CheckpointError if the file has become shorter or cannot be read."""
        try:
            data = os.pread(self._descriptor, size, start)
            while 0 < len(data) < size:  # a call may return less than it could
                rest = os.pread(self._descriptor, size - len(data), start + len(data))
                if not rest:
                    break
                data += rest
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(data) < size:
            raise CheckpointError(
                f"{self.path} has become shorter while it was read: it had {self.size:,} bytes. Is a download still "
                "running?"
            )
        return data


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a GGUF file. The last dimension of `shape` is the one whose neighbours are adjacent in memory; the
    file itself lists the dimensions in the opposite order. The tensor takes `num_bytes` bytes from the offset `start`
    of `file`."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    file: OpenFile
    start: int
    num_bytes: int

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, start: int, size: int) -> npt.NDArray[np.uint8]:
        """Returns `size` bytes of the tensor from the offset `start` within the tensor. Raises CheckpointError if the
        file cannot be read."""
        assert 0 <= start <= start + size <= self.num_bytes, "the bytes belong to the tensor"
        return np.frombuffer(self.file.read(self.start + start, size), np.uint8)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensors of a model, which may be stored in several pieces. The metadata is that of the first
    piece."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, and of all other pieces of the same model if the file is one of several pieces.
    Raises CheckpointError if a file is missing, incomplete, or not what it should be.

    The header that was read last is kept, because a vocabulary takes a while and is asked for several times during a
    start. It is read again if a file has been replaced or changed."""
    pieces = tuple(_pieces(path))
    return _read_pieces(path, pieces, tuple(map(_identity, pieces)))


def _identity(path: Path) -> tuple[int, ...]:
    """Returns numbers that change when a file is replaced or written. Raises CheckpointError if it is not there."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _read_pieces(path: Path, paths: tuple[Path, ...], identities: tuple[tuple[int, ...], ...]) -> GgufFile:
    pieces = [_read_piece(piece) for piece in paths]
    first = pieces[0]
    count = first.metadata.get("split.count", len(pieces))
    if not isinstance(count, int) or (count != len(pieces) and (count, len(pieces)) != (0, 1)):
        raise CheckpointError(
            f"{path}: split.count is {value_shown(count)}, but by their names there are {len(pieces)} pieces; give the "
            "pieces the names that they had when they were written, NAME-00001-of-0000N.gguf and so on."
        )
    tensors = dict(first.tensors)
    for piece in pieces[1:]:
        if twice := sorted(tensors.keys() & piece.tensors.keys()):
            raise CheckpointError(f"{piece.path}: tensor {shown(twice[0])} is in an earlier piece, too.")
        tensors |= piece.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if not isinstance(total, int) or total != len(tensors):
        raise CheckpointError(
            f"{path}: split.tensors.count is {value_shown(total)}, but the pieces have {len(tensors)} tensors."
        )
    return GgufFile(path, first.metadata, tensors)


def _pieces(path: Path) -> list[Path]:
    """Returns the paths of all pieces of the model of which the file `path` is a piece."""
    match = _PIECE.search(path.name)
    if match is None:
        return [path]
    number, count = int(match[1]), int(match[2])
    if not 1 <= number <= count <= _MAX_PIECES:
        raise CheckpointError(f"{path}: the name says piece {number} of {count}; 1 to {_MAX_PIECES} are expected.")
    stem = path.name[: match.start()]
    paths = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [piece.name for piece in paths if not piece.is_file()]:
        raise CheckpointError(f"{path.parent} lacks {missing[0]}, a piece of {path.name}; finish the download.")
    return paths


def _read_piece(path: Path) -> GgufFile:
    file = OpenFile(path)
    if file.size < 24:
        raise CheckpointError(f"{path} has {file.size} bytes, which is no GGUF file; download it again.")
    return _Header(file).read()


class _Header:
    """Reads the header of one file from its start to its end. `_data` has the bytes that have been read, and
    `_position` is the offset of the next byte to parse. The header ends before the offset `_end`."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._path, self._position = file, file.path, 0
        self._data, self._end = bytearray(), min(file.size, _MAX_HEADER)

    def read(self) -> GgufFile:
        self._check_version()
        num_tensors = self._count("tensors", _MAX_TENSORS, smallest=8 + 4 + 8 + 4 + 8)
        num_keys = self._count("metadata keys", _MAX_KEYS, smallest=8 + 4 + 1)
        metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._refusal(f"the metadata has {shown(key)} twice")
            metadata[key] = self._value(key, self._scalar("I"))
        listed = [self._tensor() for _ in range(num_tensors)]
        start = self._aligned(self._position, self._alignment(metadata))
        return GgufFile(self._path, metadata, self._tensors(listed, start, self._alignment(metadata)))

    def _fetch(self, end: int) -> None:
        """Reads the header at least up to the offset `end`, which is within the header. Each call that reads anything
        doubles what has been read, so a long header takes few calls."""
        if end > (have := len(self._data)):
            size = max(end - have, have, _STEP)
            self._data += self._file.read(have, min(size, self._end - have))

    def _refusal(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}; the file is damaged or no GGUF file for this server.")

    def _check_version(self) -> None:
        magic = self._take(4)
        if magic != MAGIC:
            raise CheckpointError(
                f"{self._path} begins with {magic!r}; a GGUF file begins with {MAGIC!r}. If it is a Git LFS pointer or "
                "an error page, download the file again."
            )
        version = self._scalar("I")
        if version not in VERSIONS:
            big = " (its bytes are in big-endian order)" if version.to_bytes(4, "little")[3] in VERSIONS else ""
            raise CheckpointError(f"{self._path} has GGUF version {version}{big}; this server reads versions 2 and 3.")

    def _take(self, size: int) -> bytes:
        if size > self._end - self._position:
            raise self._refusal(f"the header needs {size:,} more bytes at offset {self._position:,}, beyond its end")
        start = self._position
        self._position += size
        self._fetch(self._position)
        return bytes(self._data[start : self._position])

    def _scalar(self, code: str) -> int:
        [value] = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value

    def _count(self, what: str, limit: int, *, smallest: int) -> int:
        """Reads a number of things, each of which takes at least `smallest` bytes of the header."""
        count = self._scalar("Q")
        if count > min(limit, (self._end - self._position) // smallest):
            raise self._refusal(f"the header says {count:,} {what}, more than it can have")
        return count

    def _name(self, what: str) -> str:
        size = self._scalar("Q")
        if not 0 < size <= _MAX_NAME:
            raise self._refusal(f"{what} has {size:,} bytes; 1 to {_MAX_NAME:,} are expected")
        return self._decoded(what, self._take(size))

    def _decoded(self, what: str, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._refusal(f"{what} is not UTF-8") from None

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._decoded(f"the value of {shown(key)}", self._take(self._scalar("Q")))
        if kind == _ARRAY:
            return self._array(key, self._scalar("I"))
        if kind == _BOOL:
            return bool(self._take(1)[0])
        if kind not in _SCALARS:
            raise self._refusal(f"the value of {shown(key)} has the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._strings(key)
        if kind not in _SCALARS:
            name = _KIND_NAMES[kind] if kind < len(_KIND_NAMES) else str(kind)
            raise self._refusal(f"{shown(key)} is an array of elements of type {name}, which this server does not read")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        count = self._count(f"elements of {shown(key)}", _MAX_HEADER, smallest=dtype.itemsize)
        data = self._take(count * dtype.itemsize)
        # Bytes other than 0 and 1 are not valid in an array of numpy's type bool.
        return np.frombuffer(data, np.uint8) != 0 if kind == _BOOL else np.frombuffer(data, dtype)

    def _strings(self, key: str) -> StringArray:
        count = self._count(f"strings in {shown(key)}", _MAX_STRINGS, smallest=8)
        data, ends, total = list[bytes](), np.empty(count, np.int64), 0
        header, position, end, length = self._data, self._position, self._end, struct.Struct("<Q").unpack_from
        have = len(header)  # the number of bytes that have been fetched
        for i in range(count):
            start = position + 8
            if start > end:
                raise self._refusal(f"the header ends within the strings of {shown(key)}")
            if start > have:
                self._fetch(start)
                have = len(header)
            [size] = length(header, position)
            if size > end - start:
                raise self._refusal(f"a string of {shown(key)} has {size:,} bytes, beyond the end of the header")
            position = start + size
            if position > have:
                self._fetch(position)
                have = len(header)
            data.append(bytes(header[start:position]))
            total += size
            ends[i] = total
        self._position = position
        return StringArray(b"".join(data), ends)

    def _tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Reads an entry of the list of tensors. Returns the name, the type, the shape and the offset of the tensor in
        the data section."""
        name = self._name("the name of a tensor")
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._refusal(f"tensor {shown(name)} has {dimensions:,} dimensions; 1 to {_MAX_DIMENSIONS} are known")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        number = self._scalar("I")
        if number not in TYPES:
            what = OTHER_TYPES.get(number, f"number {number}")
            raise CheckpointError(
                f"{self._path}: tensor {shown(name)} has the type {what}; this server reads "
                f"{', '.join(kind.name for kind in TYPES.values())}."
            )
        kind = TYPES[number]
        if shape[-1] % kind.inputs:
            raise self._refusal(f"tensor {shown(name)} has rows of {shape[-1]:,} {kind.name} numbers, no whole blocks")
        return name, kind, shape, self._scalar("Q")

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            raise self._refusal(f"general.alignment is {value_shown(value)}; a power of two is expected")
        return value

    def _aligned(self, offset: int, alignment: int) -> int:
        return -(-offset // alignment) * alignment

    def _tensors(
        self, listed: list[tuple[str, BlockType, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Returns the tensors by their names. `start` is the offset of the data section in the file. Tensors lie within
        the data section, and no two of them overlap."""
        section, tensors = max(0, self._file.size - start), dict[str, GgufTensor]()
        end, last = 0, ""
        for name, kind, shape, offset in sorted(listed, key=lambda entry: entry[3]):
            size = kind.num_bytes
            for length in shape:  # Python's integers do not overflow
                size *= length
            size //= kind.inputs
            if size == 0 or offset % alignment:
                raise self._refusal(f"tensor {shown(name)} is empty, or its offset {offset:,} is not aligned")
            if offset + size > section:
                raise CheckpointError(
                    f"{self._path} is incomplete: tensor {shown(name)} ends at byte {start + offset + size:,}, and the "
                    f"file has {self._file.size:,} bytes; download it again."
                )
            if offset < end:
                raise self._refusal(f"tensors {shown(last)} and {shown(name)} overlap")
            if name in tensors:
                raise self._refusal(f"there are two tensors {shown(name)}")
            tensors[name] = GgufTensor(name, kind, shape, self._file, start + offset, size)
            end, last = offset + size, name
        return tensors
