"""This module defines how quantised weights are stored on the GPU, and how a matrix product reads such weights.

The inputs of a row are padded with zeros to whole groups of 128. A group of int8 or fp8 has 32 words of 32 bits and two
parts; a group of int4 has 16 words and four parts. Number 2w + h of a part is in half h of word w, and the first part
is in the lowest bits of each half. A shift and a mask move two numbers of a part to the places of two bfloat16 in one
register. One more instruction then converts both numbers:

* An int4 number is stored with 8 added. It becomes the lowest mantissa bits of 128; 136 is subtracted.
* An int8 number is stored as a sign and a magnitude of seven bits. It becomes the lowest mantissa bits of 128 or -128,
  which is subtracted.
* The sign, exponent and mantissa of an fp8 number move to their places in a bfloat16. A multiplication by 2^120
  corrects the exponent, also of subnormal numbers.

Every such number is exact in bfloat16 and in every other dtype of x. The scales are applied after the products.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
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
"""The number of inputs that share a scale in int4. Every row of a weight is padded to a multiple of it."""

# The largest number of weight elements that are packed at a time. Packing needs 4 bytes of temporary memory for each
# element.
CHUNK: Final = 1 << 22
BITS: Final[Mapping[str, int]] = {"": 0, "int8": 8, "fp8": 8, "int4": 4}


class PackedWeight(NamedTuple):
    """Holds a packed quantised weight [..., N, K].

    words: int32 [..., N, words per row]; scales: float32 [groups, rows], where `rows` counts the rows of all matrices,
    so that a tile reads neighbouring scales. int8 and fp8 have one group, because a row has one scale.
    """

    words: Tensor
    scales: Tensor
    inputs: int
    format: str


def read(weight: Tensor | PackedWeight) -> PackedWeight:
    """Returns a weight [..., N, K] as a PackedWeight. The weight is already packed, or it is not quantised.

    An unquantised weight gets the format "", and kernels do not read its scales.
    """
    return weight if isinstance(weight, PackedWeight) else PackedWeight(weight, weight, weight.shape[-1], "")


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Packs a quantised weight for the Triton kernels. Raises ValueError if there is no kernel for its format."""
    values, scales, group_size, bits = weight[:4]
    if weight.offsets is not None or weight.zeros is not None or weight.table is not None:
        raise ValueError("the triton kernels read weights without offsets, zeros and tables")
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
    """Packs int8 numbers [rows, K] into int32 words [rows, words per row]. fp8 numbers are passed as int8 bits."""
    bits = BITS[format]
    numbers = F.pad(values, (0, -values.shape[-1] % GROUP.value)).int()
    if format == "int4":
        numbers = numbers + 8
    elif format == "int8":
        numbers = numbers.abs() | (numbers & 0x80)
    else:
        numbers = numbers & 0xFF
    # The last dimension is split. The new shape is [rows, groups, numbers per half word, words per group, halves per
    # word].
    numbers = numbers.unflatten(-1, (-1, 16 // bits, GROUP.value * bits // 32, 2))
    shifts = torch.arange(16 // bits, dtype=torch.int32, device=values.device) * bits
    halves = (numbers << shifts[:, None, None]).sum(2, dtype=torch.int32)
    return (halves[..., 0] | (halves[..., 1] << 16)).flatten(-2)


@jit
def numbers(words: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Unpacks the numbers of one group, from int32 words [rows, words of a group] to bfloat16 [rows, GROUP]."""
    if FORMAT == "int4":
        first = tl.join(int4_part(words, 0), int4_part(words, 1))
        second = tl.join(int4_part(words, 2), int4_part(words, 3))
        parts = tl.permute(tl.join(first, second), (0, 3, 2, 1))
    else:
        parts = tl.permute(tl.join(byte_part(words << 8, FORMAT), byte_part(words, FORMAT)), (0, 2, 1))
    return tl.reshape(parts, (words.shape[0], GROUP))


@jit
def int4_part(words: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """Returns the int4 numbers in bits 4 * PART to 4 * PART + 3 of the two 16-bit halves of each word."""
    return difference((words >> (4 * PART)) & 0x000F000F | 0x43004300, tl.full(words.shape, 0x43084308, tl.int32))


@jit
def byte_part(words: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Returns the int8 or fp8 numbers in the upper bytes of the two 16-bit halves of each word."""
    sign = words & -0x7FFF8000
    if FORMAT == "int8":
        x = difference((words >> 8) & 0x007F007F | sign | 0x43004300, sign | 0x43004300)
    else:
        x = scaled((words >> 4) & 0x07F007F0 | sign)
    return x


# Triton's interpreter cannot compute in bfloat16. In the interpreter, the functions `difference` and `scaled` compute
# in float32.


@jit
def difference(words: tl.tensor, others: tl.tensor) -> tl.tensor:
    """Returns words - others without rounding errors. Each word of the two tensors holds two bfloat16 numbers."""
    x, y = pairs(words), pairs(others)
    if INTERPRETED:
        return (x.to(tl.float32) - y.to(tl.float32)).to(tl.bfloat16)
    return x - y


@jit
def scaled(words: tl.tensor) -> tl.tensor:
    """Multiplies by 2^120 without rounding errors. Each word of the tensor `words` holds two bfloat16 numbers."""
    x = pairs(words)
    if INTERPRETED:  # The interpreter's conversion to float32 turns subnormal numbers into zeros.
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (bits.to(tl.float32, bitcast=True) * 2.0**120).to(tl.bfloat16)
    return x * 2.0**120


@jit
def pairs(words: tl.tensor) -> tl.tensor:
    """Unpacks the two bfloat16 numbers of each word, the number in the lower half first: [rows, 2 * words]."""
    lower = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    upper = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (words.shape[0], 2 * words.shape[1]))
