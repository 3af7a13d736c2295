"""The file of a segment: a safetensors file whose header says what the segment is. Works without torch.

    8 bytes, little-endian: the length of the header
    the header: JSON with the shapes and places of the tensors, and "__metadata__" with texts only
    the tensors: `tokens` (int32), the tensors of the pages, the tensors of the state

The metadata has the SHA-256 of each tensor (`sha256.NAME`) and of the header itself (`sha256`). A file must have
exactly the bytes that `write_segment` makes of its contents, so a change of any byte is found. `hashlib` releases the
GIL while it hashes, as reading and writing do.
"""

from __future__ import annotations

import json
import math
import os
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BufferedReader
from typing import Any, Final

from jamba_server.engine.cache.layout import DTYPE_BYTES
from jamba_server.engine.cache.tiers.events import Reason
from jamba_server.engine.cache.tiers.segment import TOKENS, Entry, Segment, SegmentLayout, keys_match

FORMAT: Final = "jamba-segment-1"
MAX_HEADER_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 22  # bytes that are read at a time
_NAMES: Final[Mapping[str, str]] = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
}
_SIZES: Final = {_NAMES[dtype]: size for dtype, size in {**DTYPE_BYTES, "int32": 4}.items()}


class BadSegment(Exception):
    """A file that cannot be used, with the reason in one word and in words."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file: its dtype, shape and bytes [start, end) after the header, and the SHA-256 of these bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file. `num_bytes` is the size of the whole file, `data` the offset of the first tensor, and
    `created` the time of writing in seconds since 1970."""

    entry: Entry
    fingerprint: str
    block_size: int
    created: int
    tensors: Mapping[str, Tensor]
    data: int
    num_bytes: int


def write_segment(descriptor: int, segment: Segment, layout: SegmentLayout, fingerprint: str, created: int) -> int:
    """Writes a segment to an open file, which is empty, and returns the number of bytes. Raises OSError."""
    entry = segment.entry
    contents = {TOKENS: memoryview(array("i", segment.tokens)).cast("B"), **segment.tensors}
    table, position = dict[str, Tensor](), 0
    for name, (shape, dtype) in layout.tensors(entry.start, entry.end).items():
        data = contents[name]
        size = math.prod(shape) * _SIZES[_NAMES[dtype]]
        assert data.nbytes == size, f"{name} has {data.nbytes} bytes instead of {size}"
        table[name] = Tensor(_NAMES[dtype], shape, position, position + size, sha256(data).hexdigest())
        position += size
    header = _header_bytes(entry, fingerprint, layout.block_size, created, table)
    _write_all(descriptor, [memoryview(header), *(contents[name] for name in table)])
    return len(header) + position


def _write_all(descriptor: int, parts: Sequence[memoryview]) -> None:
    """Writes bytes one after the other to a file. One system call writes them all, unless the system writes less than
    it was given."""
    left = list(parts)
    while left:
        written = os.writev(descriptor, left)
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]


def _header_bytes(entry: Entry, fingerprint: str, block_size: int, created: int, table: Mapping[str, Tensor]) -> bytes:
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "block_size": str(block_size),
        "created": str(created),
        "key": entry.key.hex(),
        "parent": entry.parent.hex(),
        "base": entry.base.hex(),
        "last": entry.last.hex(),
        "start": str(entry.start),
        "end": str(entry.end),
        **{f"sha256.{name}": tensor.digest for name, tensor in table.items()},
    }
    places = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [tensor.start, tensor.end]}
        for name, tensor in table.items()
    }
    digest = sha256(_compact({"__metadata__": metadata, **places})).hexdigest()
    text = _compact({"__metadata__": {**metadata, "sha256": digest}, **places})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def read_header(file: BufferedReader) -> Header:
    """Reads and checks the header of an open file. Raises BadSegment, or OSError if the file cannot be read."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if len(length := file.read(8)) < 8:
        raise BadSegment("torn", f"the file has only {size} bytes")
    [count] = struct.unpack("<Q", length)
    if not 2 <= count <= MAX_HEADER_BYTES:
        raise BadSegment("foreign", f"the header would have {count} bytes")
    text = file.read(count)
    if len(text) < count:
        raise BadSegment("torn", f"the file ends within its header of {count} bytes")
    try:
        document = json.loads(text)
        metadata = document.pop("__metadata__")
        is_ours = metadata["format"] == FORMAT
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadSegment("foreign", "the header is not that of a segment") from None
    if not is_ours:
        raise BadSegment("foreign", "the file has another format")
    try:
        header = _parse(metadata, document, 8 + count)
        # The header is compared with the one that would be written, so nothing in it can differ unnoticed.
        expected = _header_bytes(header.entry, header.fingerprint, header.block_size, header.created, header.tensors)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise BadSegment("edited", "the header has a wrong value") from None
    if expected != length + text:
        raise BadSegment("edited", "the header is not the one that was written")
    if size != header.num_bytes:
        raise BadSegment("torn", f"the file has {size} bytes instead of {header.num_bytes}")
    return header


def _parse(metadata: Mapping[str, Any], places: Mapping[str, Any], data: int) -> Header:
    table, position = dict[str, Tensor](), 0
    for name, place in places.items():
        shape, dtype = tuple(place["shape"]), place["dtype"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(shape)
        end = position + math.prod(shape) * _SIZES[dtype]
        table[name] = Tensor(dtype, shape, position, end, metadata[f"sha256.{name}"])
        position = end
    key, parent, base, last = (bytes.fromhex(metadata[name]) for name in ("key", "parent", "base", "last"))
    start, end = int(metadata["start"]), int(metadata["end"])
    if not 0 <= start < end or TOKENS not in table:
        raise ValueError(start)
    entry = Entry(key, parent, base, last, start, end, position)
    block_size, created = int(metadata["block_size"]), int(metadata["created"])
    return Header(entry, metadata["fingerprint"], block_size, created, table, data, data + position)


def check_layout(header: Header, layout: SegmentLayout, fingerprint: str) -> None:
    """Raises BadSegment if the file was written for another model or configuration."""
    if header.fingerprint != fingerprint:
        raise BadSegment("foreign", "another model or configuration has written it")
    expected = layout.tensors(header.entry.start, header.entry.end)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in header.tensors.items()}
    if header.block_size != layout.block_size or found != {n: (s, _NAMES[d]) for n, (s, d) in expected.items()}:
        raise BadSegment("foreign", "its tensors have other shapes than those of this model")


def read_tensors(
    file: BufferedReader,
    header: Header,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Segment:
    """Reads the tokens and the tensors whose names `wanted` accepts, and checks all that is read. Raises BadSegment, or
    OSError if the file cannot be read."""
    found: dict[str, memoryview] = {}
    for name, tensor in header.tensors.items():
        if name != TOKENS and not wanted(name):
            continue
        data = memoryview(bytearray(tensor.end - tensor.start))
        file.seek(header.data + tensor.start)
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK]
            if file.readinto(part) != len(part):
                raise BadSegment("torn", f"the file ends within {name}")
        if sha256(data).hexdigest() != tensor.digest:
            raise BadSegment("edited", f"{name} is not what was written")
        found[name] = data
    tokens = array("q", array("i", found.pop(TOKENS).tobytes()))
    segment = Segment(header.entry, tokens, found)
    if not keys_match(segment, header.block_size):
        raise BadSegment("edited", "its keys are not those of its tokens")
    return segment
