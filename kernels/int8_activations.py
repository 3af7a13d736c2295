"""Says which weights can be multiplied by activations of 8 bits."""

from __future__ import annotations

from typing import Final, TypeGuard

import torch

from jamba_server.kernels.ops import QuantizedWeight, Weight

BLOCK: Final = 32
"""The number of neighbouring inputs of a row of x that share one scale."""

ALL_BITS: Final = frozenset({4, 8})
"""The numbers of bits of the weights that can be multiplied by 8-bit activations."""


def takes_int8(weight: Weight, bits: frozenset[int] = ALL_BITS) -> TypeGuard[QuantizedWeight]:
    """Returns whether a weight can be multiplied by 8-bit activations, and its number of bits is one of `bits`.

    Its numbers, or the entries of its table, must be whole numbers, and a group must have 16 inputs, a multiple of 32,
    or a whole row.
    """
    if not isinstance(weight, QuantizedWeight) or weight.values.dtype not in (torch.int8, torch.uint8):
        return False
    if weight.table is not None and not all(n == int(n) and -128 <= n <= 127 for n in weight.table):
        return False
    size = weight.group_size
    return weight.bits in bits and (size == BLOCK // 2 or size % BLOCK == 0 or size >= weight.values.shape[-1])
