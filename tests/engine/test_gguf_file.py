"""GGUF files that are wrong: each ends in one error that names the file and what is wrong with it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.gguf.reader import GgufTensor, StringArray, read_gguf
from jamba_server.engine.gguf.recognition import is_gguf

HUGE = 2**60
Entry = tuple[str, int, bytes]


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    data: int = 4096,
) -> bytes:
    counts = len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join((*keys, *tensors))
    return header + bytes(-len(header) % 32) + bytes(data)


def nested() -> bytes:
    return entry("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))


WRONG: dict[str, tuple[bytes, str]] = {
    "another file": (b"version https://git-lfs.github.com/spec/v1", "begins with b'vers'; a GGUF file begins with"),
    "empty": (b"", "has 0 bytes, which is no GGUF file"),
    "version 1": (gguf(version=1), "has GGUF version 1; this server reads versions 2 and 3"),
    "big-endian": (gguf(version=3 << 24), r"version 50331648 \(its bytes are in big-endian order\)"),
    "tensor count": (gguf(num_tensors=HUGE), "says 1,152,921,504,606,846,976 tensors, more than it can have"),
    "key count": (gguf(num_keys=HUGE), "metadata keys, more than it can have"),
    "key length": (gguf(keys=(struct.pack("<Q", HUGE),)), "a metadata key has 1,152,921,504,606,846,976 bytes"),
    "no key": (gguf(keys=(entry("", 4, bytes(4)),)), "a metadata key has 0 bytes"),
    "key twice": (gguf(keys=(entry("a", 4, bytes(4)),) * 2), 'the metadata has "a" twice'),
    "key not UTF-8": (gguf(keys=(string(b"\xff") + bytes(8),)), "a metadata key is not UTF-8"),
    "string length": (gguf(keys=(entry("a", 8, struct.pack("<Q", HUGE)),)), "needs 1,152,921,504,606,846,976 more by"),
    "string not UTF-8": (gguf(keys=(entry("a", 8, string(b"\xff")),)), 'the value of "a" is not UTF-8'),
    "type": (gguf(keys=(entry("a", 13, bytes(8)),)), 'the value of "a" has the unknown type 13'),
    "array length": (gguf(keys=(entry("a", 9, struct.pack("<IQ", 4, HUGE)),)), 'elements of "a", more than it can'),
    "strings": (gguf(keys=(entry("a", 9, struct.pack("<IQ", 8, HUGE)),)), 'strings in "a", more than it can have'),
    "string in array": (
        gguf(keys=(entry("a", 9, struct.pack("<IQQ", 8, 1, HUGE)),)),
        'a string of "a" has 1,152,921,504,606,846,976 bytes, beyond the end',
    ),
    "nested arrays": (gguf(keys=(nested(),)), '"a" is an array of elements of type array, which this server does not'),
    "alignment 0": (gguf(keys=(entry("general.alignment", 4, bytes(4)),)), "general.alignment is 0; a power of two"),
    "alignment text": (gguf(keys=(entry("general.alignment", 8, string("x")),)), 'general.alignment is "x"; a power'),
    "dimensions": (gguf(tensors=(tensor("t", (1,) * 5),)), 'tensor "t" has 5 dimensions'),
    "no numbers": (gguf(tensors=(tensor("t", (4, 0)),)), 'tensor "t" is empty'),
    "size": (
        gguf(tensors=(tensor("t", (HUGE, HUGE)),)),
        r'is incomplete: tensor "t" ends at byte [\d,]+, and the file',
    ),
    "offset": (gguf(tensors=(tensor("t", (8,), offset=HUGE),)), 'is incomplete: tensor "t" ends'),
    "unaligned": (gguf(tensors=(tensor("t", (8,), offset=8),)), 'tensor "t" is empty, or its offset 8 is not aligned'),
    "overlap": (gguf(tensors=(tensor("s", (16,)), tensor("t", (8,), offset=32))), 'tensors "s" and "t" overlap'),
    "name twice": (gguf(tensors=(tensor("t", (8,)), tensor("t", (8,), offset=32))), 'there are two tensors "t"'),
    "blocks": (gguf(tensors=(tensor("t", (33,), kind=8),)), 'tensor "t" has rows of 33 Q8_0 numbers, no whole blocks'),
    "known type": (gguf(tensors=(tensor("t", (256,), kind=16),)), 'tensor "t" has the type IQ2_XXS; this server reads'),
    "unknown type": (gguf(tensors=(tensor("t", (256,), kind=99),)), 'tensor "t" has the type number 99; this server'),
    "cut in the header": (gguf(keys=(entry("a", 8, string("x" * 99)),))[:64], "more bytes at offset"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(kind: str, tmp_path: Path) -> None:
    data, words = WRONG[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as refusal:
        read_gguf(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def written(path: Path, fill: Callable[[GGUFWriter], object]) -> Path:
    writer = GGUFWriter(path, "jamba")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(tensor: GgufTensor) -> np.ndarray:
    return tensor.read(0, tensor.num_bytes)


def test_values_and_tensors_are_those_that_the_package_wrote(tmp_path: Path) -> None:
    weight = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    values: dict[str, Any] = {"a": 2**32 - 1, "b": -1.5, "c": "text \u2581", "d": True}

    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(64)
        writer.add_uint32("a", values["a"])
        writer.add_float32("b", values["b"])
        writer.add_string("c", values["c"])
        writer.add_bool("d", values["d"])
        writer.add_array("e", [1, -2, 3])
        writer.add_array("f", ["one", "", "three"])
        writer.add_array("g", [True, False])
        writer.add_tensor("t", weight)
        writer.add_tensor("u", weight[0, 0].astype(np.float16))

    file = read_gguf(written(tmp_path / "model.gguf", fill))
    assert {key: file.metadata[key] for key in values} == values
    arrays = {key: file.metadata[key] for key in "efg"}
    assert [np.asarray(arrays["e"]).tolist(), np.asarray(arrays["g"]).tolist()] == [[1, -2, 3], [True, False]]
    strings = arrays["f"]
    assert isinstance(strings, StringArray)
    assert [strings[i] for i in range(len(strings))] == [b"one", b"", b"three"]
    assert file.tensors["t"].shape == (2, 3, 4)
    assert contents(file.tensors["t"]).tobytes() == weight.tobytes()
    assert file.tensors["u"].kind.name == "F16"


def test_a_model_in_pieces(tmp_path: Path) -> None:
    def piece(number: int, name: str) -> Path:
        def fill(writer: GGUFWriter) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", 2)
            writer.add_tensor(name, np.full(8, number, dtype=np.float32))

        return written(tmp_path / f"model-0000{number + 1}-of-00002.gguf", fill)

    first, second = piece(0, "a"), piece(1, "b")
    for path in (first, second):
        file = read_gguf(path)
        assert {name: contents(tensor).view(np.float32)[0] for name, tensor in file.tensors.items()} == {"a": 0, "b": 1}
    second.rename(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"lacks model-00002-of-00002\.gguf, a piece of model-00001-of-00002\.gguf"
    ):
        read_gguf(first)
    first.rename(tmp_path / "one.gguf")
    with pytest.raises(CheckpointError, match=r"split\.count is 2, but by their names there are 1 pieces"):
        read_gguf(tmp_path / "one.gguf")


def test_a_file_is_known_by_its_first_bytes_or_its_name(tmp_path: Path) -> None:
    for name, data, expected in (("blob", b"GGUF", True), ("a.gguf", b"", True), ("blob2", b"GGML", False)):
        (tmp_path / name).write_bytes(data)
        assert is_gguf(tmp_path / name) == expected
    assert not is_gguf(tmp_path)


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", lambda writer: writer.add_tensor("t", np.ones(1 << 16, np.float32)))
    tensor = read_gguf(path).tensors["t"]
    os.truncate(path, path.stat().st_size - 1)
    assert len(tensor.read(0, 1024)) == 1024
    with pytest.raises(CheckpointError, match=r"model\.gguf has become shorter while it was read"):
        contents(tensor)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="has become shorter"):
        tensor.read(0, 1024)
