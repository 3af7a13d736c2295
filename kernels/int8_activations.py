"""Says which weights can be multiplied by activations of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeGuard

import torch

from jamba_server.kernels.ops import QuantizedWeight, Weight

BLOCK: Final = 32
"""The number of neighbouring inputs of a row of x that share one scale."""

ALL_BITS: Final = frozenset({4, 8})
"""The numbers of bits of the weights that can be multiplied by 8-bit activations."""


def takes_int8(weight: Weight) -> TypeGuard[QuantizedWeight]:
    """Returns whether a weight can be multiplied by 8-bit activations.

    Its numbers, or the entries of its table, must be whole numbers, and a group must have 16 inputs, a multiple of 32,
    or a whole row.
    """
    if not isinstance(weight, QuantizedWeight) or weight.values.dtype not in (torch.int8, torch.uint8):
        return False
    if weight.table is not None and not all(n == int(n) and -128 <= n <= 127 for n in weight.table):
        return False
    size = weight.group_size
    return size == BLOCK // 2 or size % BLOCK == 0 or size >= weight.values.shape[-1]


def int8_parts(parts: Sequence[Weight], bits: frozenset[int]) -> tuple[QuantizedWeight, ...] | None:
    """Returns the weights `parts`, which one kernel multiplies together, if they are to be multiplied by 8-bit
    activations: all of them can be, and one of them has a number of bits that is in `bits`. Otherwise returns None."""
    able = tuple(part for part in parts if takes_int8(part))
    return able if len(able) == len(parts) and any(part.bits in bits for part in able) else None
