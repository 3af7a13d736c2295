"""Packed weights have the layouts that `gemm.h` and `a8.h` define, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pytest
import torch

from jamba_server.engine.gguf.blocks import TYPES
from jamba_server.engine.gguf.stored import format_of
from jamba_server.engine.quantization import FORMATS, Format
from jamba_server.engine.quantization.stored import empty
from jamba_server.kernels.cpu.a8 import Packer as PackerA8
from jamba_server.kernels.cpu.linear import Packer
from jamba_server.kernels.int8_activations import takes_int8
from jamba_server.kernels.ops import KernelUnavailable, QuantizedWeight

PANEL, SUPER = 32, 256
FORMS: Final[Mapping[str, Format]] = {
    **{kind.name: format_of(kind) for kind in TYPES.values() if kind.unpack},
    **FORMATS,
    "zeros4": Format(bits=4, limit=15, group_size=64, scale="float16", is_unsigned=True, has_zero=True),
    "zeros8": Format(bits=8, limit=255, group_size=64, is_unsigned=True, has_zero=True),
    "groups16": Format(bits=8, limit=127, group_size=16, has_offset=True),
}
# Whole panels, a panel of six columns, a panel of one column, and inputs that fill no whole tile or no whole group.
SHAPES = ((64, 512), (38, 256), (33, 768), (64, 88), (35, 90))


@pytest.fixture(scope="module")
def packer() -> Packer:
    try:
        return Packer()
    except KernelUnavailable as error:
        pytest.skip(str(error))


def random_weight(form: Format, shape: tuple[int, int]) -> QuantizedWeight:
    """Returns a weight of random bytes. Numbers of four bits have the range of their format."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        size = (*tensor.shape[:-1], tensor.shape[-1] * tensor.element_size())
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(tensor.dtype)

    weight = empty(form, shape, torch.device("cpu")).each(fill)
    if form.bits == 4:
        values = weight.values & 15 if weight.values.dtype == torch.uint8 else weight.values >> 4
        weight = weight._replace(values=values)
    return weight


def octets(tensor: torch.Tensor, rows: slice) -> np.ndarray:
    """Returns rows of a tensor [N, X] as bytes [32, X, bytes of an element]; missing rows are zeros."""
    part = np.ascontiguousarray(tensor.view(torch.uint8).numpy().reshape(*tensor.shape, -1)[rows])
    return np.concatenate([part, np.zeros((PANEL - len(part), *part.shape[1:]), np.uint8)])


def panel_of(weight: QuantizedWeight, rows: slice) -> bytes:
    """Returns a panel in the layout of `gemm.h`, built number by number."""
    values, inputs, size = octets(weight.values, rows)[..., 0], weight.values.shape[1], weight.group_size
    shifts = weight.zeros if weight.offsets is None else weight.offsets
    out = bytearray()
    for group, start in enumerate(range(0, inputs, size)):
        if weight.super_scales is not None and start % SUPER == 0:
            for tensor in (weight.super_scales, weight.super_offsets):
                out += b"" if tensor is None else octets(tensor, rows)[:, start // SUPER].tobytes()
        numbers = values[:, start : start + size]
        step = 2 if weight.bits == 8 else 8
        numbers = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % step)))
        out += numbers.T.tobytes() if weight.bits == 8 else steps_of_four_bits(numbers)
        for tensor in (weight.scales, shifts):
            out += b"" if tensor is None else octets(tensor, rows)[:, group].tobytes()
    return bytes(out)


def steps_of_four_bits(numbers: np.ndarray) -> bytes:
    """Packs [32, n]: element i of a step of eight is in the 16-bit word i % 2 of its column, from bit 4 * (i / 2)."""
    out = np.zeros((numbers.shape[1] // 8, PANEL, 2), np.uint16)
    for i in range(8):
        out[..., i % 2] |= (numbers[:, i::8].T & np.uint8(15)).astype(np.uint16) << np.uint16(4 * (i // 2))
    return out.tobytes()


def panel_of_a8(weight: QuantizedWeight, rows: slice) -> bytes:
    """Returns a panel in the layout of `a8.h`, built block by block."""
    signed = weight.values.dtype == torch.int8
    bias = 0 if weight.table is not None or not signed else 128 if weight.bits == 8 else 8
    inputs, groups = weight.values.shape[1], weight.scales.shape[1]
    values = np.zeros((PANEL, -(-inputs // 32) * 32), np.uint8)
    count = len(weight.values[rows])
    values[:count, :inputs] = octets(weight.values, rows)[:count, :, 0] + np.uint8(bias)
    size, out = weight.group_size, bytearray()
    per_block = 2 if size < 32 and inputs > size else 1
    blocks = values.shape[1] // 32
    group_blocks = 1 if per_block == 2 else blocks if size >= inputs else size // 32
    for block in range(blocks):
        if weight.super_scales is not None and block % 8 == 0:
            for tensor in (weight.super_scales, weight.super_offsets):
                out += b"" if tensor is None else octets(tensor, rows)[:, block // 8].tobytes()
        words = values[:, 32 * block : 32 * block + 32].reshape(PANEL, 8, 4).transpose(1, 0, 2)
        out += words.tobytes() if weight.bits == 8 else (words[::2] & 15 | words[1::2] << np.uint8(4)).tobytes()
        if (block + 1) % group_blocks and block + 1 < blocks:
            continue
        for half in range(per_block):
            group = block // group_blocks * per_block + half
            for tensor in (weight.scales, weight.offsets, weight.zeros):
                if tensor is not None:
                    found = octets(tensor, rows)
                    out += (found[:, group] if group < groups else np.zeros_like(found[:, 0])).tobytes()
    return bytes(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_quantised_weights(name: str, shape: tuple[int, int], packer: Packer) -> None:
    form = FORMS[name]
    if form.scale == "two_levels" and shape[1] % SUPER:
        pytest.skip("this format has whole blocks of 256 inputs")
    weight = random_weight(form, shape)
    panels = [slice(first, first + PANEL) for first in range(0, shape[0], PANEL)]
    if name == "fp8":
        weight = weight._replace(values=weight.values.view(torch.float8_e4m3fn))
    expected = b"".join(panel_of(weight, rows) for rows in panels)
    assert packer(weight).panels.numpy().tobytes() == expected
    if takes_int8(weight):
        expected = b"".join(panel_of_a8(weight, rows) for rows in panels)
        assert PackerA8(packer)(weight).panels.numpy().tobytes() == expected


@pytest.mark.parametrize("shape", [*SHAPES, (64, 7), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights(dtype: torch.dtype, shape: tuple[int, int], packer: Packer) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = bytearray()
    for first in range(0, shape[0], PANEL):
        panel = octets(weight, slice(first, first + PANEL))  # [32, K, bytes]
        panel = np.pad(panel, ((0, 0), (0, shape[1] % 2), (0, 0)))
        if dtype == torch.bfloat16:  # pairs of neighbouring inputs stay together
            panel = panel.reshape(PANEL, -1, 4)
        expected += panel.transpose(1, 0, 2).tobytes()
    assert packer(weight).panels.numpy().tobytes() == bytes(expected)
