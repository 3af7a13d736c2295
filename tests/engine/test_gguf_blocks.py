"""The numbers of every type of block are those of the package `gguf`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as oracle

from jamba_server.engine.gguf.blocks import OTHER_TYPES, TYPES, BlockType, dequantize
from jamba_server.engine.gguf.reader import read_gguf
from jamba_server.engine.gguf.stored import format_of
from jamba_server.engine.gguf.weights import read_tensors
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.blocks import common_format
from jamba_server.engine.quantization.stored import dequantize as dequantize_weight
from jamba_server.engine.quantization.stored import empty, fill
from jamba_server.kernels.ops import QuantizedWeight

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
def test_weights_in_memory_have_the_numbers_of_the_file(number: int, tmp_path: Path) -> None:
    """Of two matrices: one as it is read, and one in the format that it shares with every other type."""
    kind, data = TYPES[number], corners(TYPES[number])
    blocks = data.reshape(-1, kind.num_bytes)
    writer = GGUFWriter(path := tmp_path / "model.gguf", "jamba")
    writer.add_tensor("output.weight", blocks, raw_dtype=GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [read] = read_tensors(read_gguf(path), torch.float32)
    assert (read.name, read.num_bytes) == ("lm_head.weight", len(data))
    weight = read.loaded
    assert isinstance(weight, QuantizedWeight)
    assert weight.values.shape == (len(blocks), kind.inputs)
    form = format_of(kind)
    assert (weight.bits, weight.group_size, weight.table) == (form.bits, form.group_size, form.table)
    largest = int(weight.values.to(torch.int16).abs().max())
    assert largest <= form.limit + (not form.is_unsigned), "a signed number may be one less than -limit"
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(oracle(blocks, GGMLQuantizationType(number)))
    assert torch.equal(weight.dequantized().nan_to_num(7), expected.nan_to_num(7))
    common = common_format([form, Format(bits=8, limit=127, group_size=16)])
    assert common is not None
    fill(wide := empty(common, weight.values.shape, torch.device("cpu")), weight)
    assert torch.equal(wide.dequantized().nan_to_num(7), expected.nan_to_num(7))
    dequantize_weight(weight, plain := torch.empty(expected.shape))
    assert torch.equal(plain.nan_to_num(7), expected.nan_to_num(7))


def test_the_bytes_of_256_numbers_in_memory() -> None:
    sizes = {kind.name: format_of(kind).num_bytes(1, 256) for kind in TYPES.values() if kind.unpack}
    assert sizes == {
        "Q4_0": 128 + 16,
        "Q4_1": 128 + 32,
        "Q5_0": 256 + 16,
        "Q5_1": 256 + 32,
        "Q8_0": 256 + 16,
        "Q2_K": 128 + 2 * (16 + 2),
        "Q3_K": 128 + 16 + 2,
        "Q4_K": 128 + 2 * (8 + 2),
        "Q5_K": 256 + 2 * (8 + 2),
        "Q6_K": 256 + 16 + 2,
        "IQ4_NL": 128 + 16,
        "IQ4_XS": 128 + 8 + 2,
    }


def test_names_and_sizes_are_those_of_the_package() -> None:
    known = {kind.value: (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    for number, kind in TYPES.items():
        assert known.pop(number) == (kind.name, kind.inputs, kind.num_bytes)
    assert {number: name for number, (name, *_) in known.items()}.items() <= OTHER_TYPES.items()
