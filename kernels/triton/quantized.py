"""Quantised weights on the device: their layout, and how a product reads it.

The inputs of a row are filled up with zeros to whole groups of 128. A group is so many words of 32 bits: 32 of one-byte
numbers, 16 of int4. It has two parts, four for int4; number 2w + h of a part is in half h of word w, the first part in
the lowest bits. A shift and a mask bring a part's numbers to where two bfloat16 stand side by side in one register, and
one instruction more makes numbers of the bits, two at a time:

* int4, with 8 added: the last digits of 128, from which 136 is taken.
* int8, as a sign and a magnitude of seven bits: the last digits of 128 or -128, from which that is taken.
* fp8: sign, exponent and mantissa move to bfloat16's places; times 2^120, the exponent is right, also of subnormals.

All are numbers of bfloat16, exactly, and of every other dtype of x. Their scales stay outside the products.
"""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.kernels.triton.launch import INTERPRETED, cdiv, jit

GROUP = tl.constexpr(128)
"""Inputs that int4 has a scale for, and to a multiple of which every row is filled up."""

CHUNK: Final = 1 << 22  # numbers that are packed at a time, of 32 bits on the way
BITS: Final[Mapping[str, int]] = {"": 0, "int8": 8, "fp8": 8, "int4": 4}


class PackedWeight(NamedTuple):
    """A quantised weight [..., N, K]. words: int32 [..., N, words of a row]; scales: float32 [groups, rows], of all
    matrices' rows, side by side as a tile takes them; one group where a row has one scale."""

    words: Tensor
    scales: Tensor
    inputs: int
    format: str


def read(weight: Tensor | PackedWeight) -> PackedWeight:
    """What kernels take of any weight [..., N, K]: one of floats has no format, and no scales that are read."""
    return weight if isinstance(weight, PackedWeight) else PackedWeight(weight, weight, weight.shape[-1], "")


def pack(weight: QuantizedWeight) -> PackedWeight:
    """ValueError unless there is a kernel for this weight."""
    values, scales, group_size, bits = weight
    inputs, group = values.shape[-1], GROUP.value
    format = {(torch.int8, 8): "int8", (torch.int8, 4): "int4", (torch.float8_e4m3fn, 8): "fp8"}.get(
        (values.dtype, bits)
    )
    if format is None:
        raise ValueError(f"the triton kernels read int8, int4 and fp8 weights, not {values.dtype} of {bits} bits")
    if group_size != group if format == "int4" else group_size < inputs:
        rule = f"{group} inputs" if format == "int4" else "whole rows"
        raise ValueError(f"the triton kernels read {format} weights in groups of {rule}, not of {group_size}")
    expected = (*values.shape[:-1], cdiv(inputs, group_size))
    if tuple(scales.shape) != expected or scales.dtype != torch.float32:
        raise ValueError(
            f"values {tuple(values.shape)} in groups of {group_size} have float32 scales {expected}, not "
            f"{scales.dtype} {tuple(scales.shape)}"
        )
    words = values.new_empty(*values.shape[:-1], cdiv(inputs, group) * group * bits // 32, dtype=torch.int32)
    step = len(words.flatten(0, -2)) if words.is_meta else max(1, CHUNK // inputs)
    chunks = zip(*(rows.flatten(0, -2).split(step) for rows in (values.view(torch.int8), words)), strict=True)
    for some_values, some_words in chunks:
        some_words.copy_(_words(some_values, format))
    return PackedWeight(words, scales.flatten(0, -2).t().contiguous(), inputs, format)


def _words(values: Tensor, format: str) -> Tensor:
    """int8 [rows, K], of fp8 their bits -> int32 [rows, words]."""
    bits = BITS[format]
    numbers = F.pad(values, (0, -values.shape[-1] % GROUP.value)).int()
    if format == "int4":
        numbers = numbers + 8
    elif format == "int8":
        numbers = numbers.abs() | (numbers & 0x80)
    else:
        numbers = numbers & 0xFF
    # [rows, groups, parts, words of a group, halves of a word]
    numbers = numbers.unflatten(-1, (-1, 16 // bits, GROUP.value * bits // 32, 2))
    shifts = torch.arange(16 // bits, dtype=torch.int32, device=values.device) * bits
    halves = (numbers << shifts[:, None, None]).sum(2, dtype=torch.int32)
    return (halves[..., 0] | (halves[..., 1] << 16)).flatten(-2)


@jit
def numbers(words: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """bfloat16 [rows, GROUP] of int32 [rows, words of a group]."""
    if FORMAT == "int4":
        first = tl.join(int4_part(words, 0), int4_part(words, 1))
        second = tl.join(int4_part(words, 2), int4_part(words, 3))
        parts = tl.permute(tl.join(first, second), (0, 3, 2, 1))
    else:
        parts = tl.permute(tl.join(byte_part(words << 8, FORMAT), byte_part(words, FORMAT)), (0, 2, 1))
    return tl.reshape(parts, (words.shape[0], GROUP))


@jit
def int4_part(words: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """The numbers of four bits from 4 * PART on in each half of a word."""
    return difference((words >> (4 * PART)) & 0x000F000F | 0x43004300, tl.full(words.shape, 0x43084308, tl.int32))


@jit
def byte_part(words: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Those of the upper byte of each half of a word."""
    sign = words & -0x7FFF8000
    if FORMAT == "int8":
        x = difference((words >> 8) & 0x007F007F | sign | 0x43004300, sign | 0x43004300)
    else:
        x = scaled((words >> 4) & 0x07F007F0 | sign)
    return x


# bfloat16 in the interpreter: see `launch.dot`.


@jit
def difference(words: tl.tensor, others: tl.tensor) -> tl.tensor:
    """Of two pairs of bfloat16 each, exact."""
    x, y = pairs(words), pairs(others)
    if INTERPRETED:
        return (x.to(tl.float32) - y.to(tl.float32)).to(tl.bfloat16)
    return x - y


@jit
def scaled(words: tl.tensor) -> tl.tensor:
    """Pairs of bfloat16 times 2^120, exact."""
    x = pairs(words)
    if INTERPRETED:  # its conversion loses subnormals
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (bits.to(tl.float32, bitcast=True) * 2.0**120).to(tl.bfloat16)
    return x * 2.0**120


@jit
def pairs(words: tl.tensor) -> tl.tensor:
    """bfloat16 [rows, 2 * words]: the lower and the upper half of each."""
    lower = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    upper = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (words.shape[0], 2 * words.shape[1]))
