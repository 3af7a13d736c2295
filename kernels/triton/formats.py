"""This module describes the formats in which the Triton kernels read quantised weights.

A format is a text such as "uint4/32 two_levels offsets", which kernels receive as a compile-time constant. Its first
word has the kind of the numbers and the size of a group. The kinds are "int4", "uint4", "table" (4-bit indices into a
table), "int8", "uint8" and "fp8". The size of a group is 16, 32, 64 or 128 inputs, or "row" if a row has one scale. The
other words say whether the scales have two levels and whether there are offsets or zeros.

Kernels call the functions that are decorated with `constant`. Triton recompiles a kernel if the text of such a function
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from jamba_server.kernels.ops import SUPER_GROUP, QuantizedWeight
from jamba_server.kernels.triton.launch import cdiv, constant

GROUP_SIZES: Final = (128, 64, 32, 16)
KINDS: Final[Mapping[tuple[torch.dtype, int], str]] = {
    (torch.int8, 4): "int4",
    (torch.uint8, 4): "uint4",
    (torch.int8, 8): "int8",
    (torch.uint8, 8): "uint8",
    (torch.float8_e4m3fn, 8): "fp8",
}


@constant
def kind_of(format: str) -> str:
    """Returns the kind of the numbers."""
    return format.split("/")[0]


@constant
def group_of(format: str) -> int:
    """Returns the number of inputs that share a scale, or 0 if a row has one scale."""
    size = format.split("/")[1].split(" ")[0]
    return 0 if size == "row" else int(size)


@constant
def has(format: str, word: str) -> bool:
    """Returns whether the format has "two_levels", "offsets" or "zeros"."""
    return word in format


@constant
def bits_of(format: str) -> int:
    """Returns the number of bits of a stored number."""
    return 8 if kind_of(format) in ("int8", "uint8", "fp8") else 4


@constant
def part_of(format: str) -> int:
    """Returns the number of inputs in a part of a chunk, which the module `quantized` explains."""
    return min(group_of(format) or 128, 8 * bits_of(format))


@constant
def chunk_of(format: str) -> int:
    """Returns the number of inputs in a chunk, which has 16 / bits parts. Two numbers of each part are in one word."""
    return part_of(format) * (16 // bits_of(format))


def format_of(weight: QuantizedWeight) -> str:
    """Returns the text that describes how a weight is stored.

    Raises ValueError if there is no kernel for its format, or if the shapes or dtypes of its tensors do not fit.
    """
    values, size, inputs = weight.values, weight.group_size, weight.values.shape[-1]
    kind = KINDS.get((values.dtype, weight.bits))
    if kind is None:
        known = "int8 and uint8 of 4 and 8 bits, and float8_e4m3fn"
        raise ValueError(f"the triton kernels read {known}, not {values.dtype} of {weight.bits} bits")
    if weight.table is not None and (kind != "uint4" or len(weight.table) != 16 or weight.zeros is not None):
        raise ValueError(f"a table has 16 numbers, which uint8 values of 4 bits without zeros select, not {kind}")
    if weight.zeros is not None and (not kind.startswith("uint") or weight.offsets is not None):
        raise ValueError(f"zeros belong to unsigned numbers without offsets, not to {kind}")
    _check_groups(weight)
    two_levels, offsets = weight.super_scales is not None, weight.offsets is not None
    if size >= inputs and not two_levels:  # A row is one group.
        group = GROUP_SIZES[0] if offsets else 0
    elif size <= 0 or size % GROUP_SIZES[-1]:
        raise ValueError(f"the triton kernels read groups of a multiple of 16 inputs, and whole rows, not of {size}")
    else:
        group = next(group for group in GROUP_SIZES if size % group == 0)
    words = [f"{'table' if weight.table else kind}/{group or 'row'}"]
    words += ["two_levels"] * two_levels + ["offsets"] * offsets + ["zeros"] * (weight.zeros is not None)
    return " ".join(words)


def _check_groups(weight: QuantizedWeight) -> None:
    """Raises ValueError if a tensor with numbers for each group has another shape or dtype than `QuantizedWeight`."""
    size, two_levels = weight.group_size, weight.super_scales is not None
    if two_levels and (size <= 0 or SUPER_GROUP % size):
        raise ValueError(f"scales of two levels have groups that divide {SUPER_GROUP} inputs, not of {size}")
    if (weight.super_offsets is not None) != (two_levels and weight.offsets is not None):
        raise ValueError("scales and offsets must both have two levels, or neither")
    fields: list[tuple[str, Tensor | None, int, tuple[torch.dtype, ...]]] = [
        ("scales", weight.scales, size, (torch.int8, torch.uint8) if two_levels else (torch.float32, torch.float16)),
        ("offsets", weight.offsets, size, (weight.scales.dtype,)),
        ("zeros", weight.zeros, size, (torch.uint8,)),
        ("super_scales", weight.super_scales, SUPER_GROUP, (torch.float16,)),
        ("super_offsets", weight.super_offsets, SUPER_GROUP, (torch.float16,)),
    ]
    for name, tensor, size, dtypes in fields:
        expected = (*weight.values.shape[:-1], cdiv(weight.values.shape[-1], max(size, 1)))
        if tensor is not None and (tuple(tensor.shape) != expected or tensor.dtype not in dtypes):
            raise ValueError(
                f"values {tuple(weight.values.shape)} in groups of {size} have {' or '.join(map(str, dtypes))} {name} "
                f"{expected}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
