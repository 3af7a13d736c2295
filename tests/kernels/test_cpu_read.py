"""The compiled reader gives the same bits as numpy, and says what is wrong with a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from jamba_server.engine.gguf.blocks import TYPES, unpack
from jamba_server.engine.gguf.stored import format_of
from jamba_server.engine.quantization.stored import empty
from jamba_server.kernels.cpu.read import Failure, Reader, fits
from jamba_server.kernels.ops import KernelUnavailable, QuantizedWeight

CPU = torch.device("cpu")
START = 3  # bytes before the tensor in the file
# More than two pieces of 131072 numbers, the last one not full.
COUNT = {32: 9001, 256: 1201}
BLOCK_TYPES = [number for number, kind in TYPES.items() if kind.unpack]


@pytest.fixture(scope="module")
def reader() -> Reader:
    try:
        return Reader()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    files = Written(tmp_path / "file")
    yield files
    files.close()


class Written:
    """Writes bytes to a file, after three other bytes, and returns the file's descriptor."""

    def __init__(self, path: Path) -> None:
        self._path, self._open = path, list[int]()

    def __call__(self, data: bytes) -> int:
        self._path.write_bytes(b"abc" + data)
        self._open.append(os.open(self._path, os.O_RDONLY))
        return self._open[-1]

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)


def blocks_of(number: int, count: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, TYPES[number].num_bytes), dtype=np.uint8)


def weight_for(number: int, count: int) -> QuantizedWeight:
    return empty(format_of(TYPES[number]), (count, TYPES[number].inputs), CPU)


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=lambda number: TYPES[number].name)
def test_blocks_are_unpacked_as_numpy_unpacks_them(number: int, reader: Reader, written: Written) -> None:
    """The blocks are random bytes, so some scales are infinite or NaN; everything is read nevertheless."""
    count = COUNT[TYPES[number].inputs]
    data, weight = blocks_of(number, count), weight_for(number, count)
    assert reader.blocks(written(data.tobytes()), START, number, count, weight) is Failure.NOT_FINITE
    parts = (weight.values, weight.scales, weight.offsets, weight.super_scales, weight.super_offsets)
    for part, expected in zip(parts, unpack(TYPES[number], data), strict=True):
        assert (part is None) == (expected is None)
        if part is not None and expected is not None:
            assert part.numpy().tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("number", BLOCK_TYPES, ids=lambda number: TYPES[number].name)
def test_scales_of_every_block_must_be_finite(number: int, reader: Reader, written: Written) -> None:
    kind, count = TYPES[number], COUNT[TYPES[number].inputs]
    halves = {32: (0, 2), 256: (0, 2)}[kind.inputs] if kind.has_offset else (0,)
    first = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind.name, 0)
    weight = weight_for(number, count)
    data = np.zeros((count, kind.num_bytes), np.uint8)
    assert reader.blocks(written(data.tobytes()), START, number, count, weight) is None
    for half in halves:
        for block in (0, count - 1):
            spoilt = data.copy()
            spoilt[block, first + half : first + half + 2] = 0x00, 0x7C  # infinity
            assert reader.blocks(written(spoilt.tobytes()), START, number, count, weight) is Failure.NOT_FINITE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_numbers_are_read_as_they_are(dtype: torch.dtype, reader: Reader, written: Written) -> None:
    """In a tensor of more than two pieces of 262144 bytes."""
    expected = torch.randn(700_001).mul(20).to(dtype)
    data = expected.view(torch.uint8).numpy().tobytes()
    found = torch.empty_like(expected)
    assert reader.numbers(written(data), START, found) is None
    assert found.view(torch.uint8).equal(expected.view(torch.uint8))
    assert reader.numbers(written(data[:-1]), START, found) is Failure.SHORTER
    if dtype.is_floating_point:
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = expected.float()
            spoilt[-1] = value if dtype != torch.float8_e4m3fn else torch.nan  # this dtype has no infinity
            data = spoilt.to(dtype).view(torch.uint8).numpy().tobytes()
            assert reader.numbers(written(data), START, found) is Failure.NOT_FINITE


def test_numbers_of_four_bits_are_signed(reader: Reader, written: Written) -> None:
    data = np.random.default_rng(0).integers(0, 256, 200_001, dtype=np.uint8)
    signed = data.view(np.int8)
    expected = np.stack([(signed << 4) >> 4, signed >> 4], axis=-1)
    found = torch.empty(2 * len(data), dtype=torch.int8)
    assert reader.nibbles(written(data.tobytes()), START, found) is None
    assert np.array_equal(found.numpy(), expected.reshape(-1))
    assert reader.nibbles(written(data[:-1].tobytes()), START, found) is Failure.SHORTER


def test_a_file_that_ends_early_and_one_that_cannot_be_read(reader: Reader, written: Written) -> None:
    data, weight = np.zeros((9001, 34), np.uint8), weight_for(8, 9001)
    assert reader.blocks(written(data[:-1].tobytes()), START, 8, 9001, weight) is Failure.SHORTER
    with pytest.raises(OSError, match="cannot be read"):
        reader.blocks(-1, START, 8, 9001, weight)


def test_only_contiguous_tensors_of_known_dtypes_fit(reader: Reader, written: Written) -> None:
    assert fits(torch.empty(4, 4))
    assert not fits(torch.empty(4, 4).T)
    assert not fits(torch.empty(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="be contiguous"):
        reader.numbers(written(bytes(64)), START, torch.empty(4, 4).T)
