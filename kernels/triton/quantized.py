"""Quantised weights on the device: their layout, and how a product reads it.

Whatever the format, the inputs of a row are filled up with zeros to whole groups of 128, so that every row starts at a
border of 64 bytes and none needs a mask along K:

* int8 and fp8: a byte a number, the latter's bits as they are.
* int4: 64 bytes a group. The lower half of byte j is number j of the group, the upper half number 64 + j: each half of
  a tile of bytes is a tile of numbers without any exchange between threads. Both have 8 added, which makes them
  mantissas.

A kernel meets the numbers as exact ones of x's dtype; the scales stay outside its products.
"""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from kernels.ops import QuantizedWeight
from kernels.triton.launch import cdiv, jit

GROUP: Final = tl.constexpr(128)
"""Inputs that int4 has a scale for, and to a multiple of which every row is filled up."""


class PackedWeight(NamedTuple):
    """A quantised weight [..., N, K]. data: int8 [..., N, bytes of a row]; scales: float32 [..., N, groups]."""

    data: Tensor
    scales: Tensor
    inputs: int
    format: str


def pack(weight: QuantizedWeight) -> PackedWeight:
    """ValueError unless there is a kernel for this weight."""
    values, scales, group_size, bits = weight
    inputs, group = values.shape[-1], GROUP.value
    format = "fp8" if values.dtype == torch.float8_e4m3fn else f"int{bits}"
    if format not in ("int8", "int4", "fp8") or values.dtype.itemsize != 1:
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
    return PackedWeight(_words(values.view(torch.int8), format), scales.contiguous(), inputs, format)


def _words(values: Tensor, format: str) -> Tensor:
    whole = F.pad(values, (0, -values.shape[-1] % GROUP.value)).int()
    bits = 4 if format == "int4" else 8
    codes = whole + 8 if format == "int4" else whole.abs() | (whole & 0x80) if format == "int8" else whole & 0xFF
    # [..., groups, parts of a group, words, halves of a word]
    codes = codes.unflatten(-1, (-1, 16 // bits, GROUP.value * bits // 32, 2))
    halves = codes[..., 0, :, :].clone()
    for part in range(1, 16 // bits):
        halves |= codes[..., part, :, :] << bits * part
    return (halves[..., 0] | (halves[..., 1] << 16)).flatten(-2)


def read(weight: Tensor | PackedWeight) -> PackedWeight:
    """What kernels take of any weight [..., N, K]: one of floats has no format, and no scales that are read."""
    return weight if isinstance(weight, PackedWeight) else PackedWeight(weight, weight, weight.shape[-1], "")


@jit
def numbers(words: tl.tensor, PART: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """bfloat16 [rows, 2 * words]: the exact numbers of a PART."""
    if FORMAT == "int4":
        x = pairs((words >> (4 * PART)) & 0x000F000F | 0x43004300) - 136.0
    elif FORMAT == "fp8":
        if PART == 0:
            words = words << 8
        x = pairs((words & -0x7FFF8000) | ((words & 0x7F007F00) >> 4)) * 2.0**120
    else:
        if PART == 0:
            words = words << 8
        sign = words & -0x7FFF8000
        x = pairs(((words >> 8) & 0x007F007F) | sign | 0x43004300) - pairs(sign | 0x43004300)
    return x


@jit
def pairs(words: tl.tensor) -> tl.tensor:
    """bfloat16 [rows, 2 * words] of the words' lower and upper halves."""
    lower = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    upper = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (words.shape[0], 2 * words.shape[1]))
