"""The numbers of every type of block are those of the package `gguf`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as oracle

from jamba_server.engine.gguf.blocks import OTHER_TYPES, TYPES, BlockType, dequantize, unpack

BLOCKS = 512


def corners(kind: BlockType) -> np.ndarray:
    """Random blocks, and blocks of equal bytes: zeros, the largest numbers, and denormal halves."""
    rng = np.random.default_rng(7)
    random = rng.integers(0, 256, (BLOCKS, kind.num_bytes), dtype=np.uint8)
    same = np.repeat(np.array([0x00, 0x01, 0x7B, 0x80, 0xFB, 0xFF], dtype=np.uint8), kind.num_bytes)
    return np.concatenate([random.reshape(-1), same])


@pytest.mark.parametrize("number", TYPES)
def test_numbers_equal_those_of_the_package(number: int) -> None:
    kind, data = TYPES[number], corners(TYPES[number])
    with np.errstate(all="ignore"):
        expected = oracle(data.reshape(1, -1), GGMLQuantizationType(number)).reshape(-1)
    numbers = dequantize(kind, data)
    assert numbers.dtype == np.float32
    assert np.array_equal(numbers, expected, equal_nan=True)


@pytest.mark.parametrize("number", [number for number, kind in TYPES.items() if kind.unpack])
def test_the_table_says_what_the_blocks_hold(number: int) -> None:
    kind = TYPES[number]
    groups = unpack(kind, corners(kind))
    assert groups.values.dtype == np.int8
    assert groups.values.shape[1:] == (kind.inputs // kind.group, kind.group)
    assert groups.scales.shape == groups.values.shape[:2]
    assert (groups.offsets is not None) == kind.has_offset
    assert kind.bits == 8 or (groups.values.min() >= -8 and groups.values.max() <= 7)


def test_names_and_sizes_are_those_of_the_package() -> None:
    known = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    for number, kind in TYPES.items():
        assert known.pop(number) == (kind.name, kind.inputs, kind.num_bytes)
    assert {number: name for number, (name, *_) in known.items()}.items() <= OTHER_TYPES.items()
