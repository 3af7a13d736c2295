"""Says which weights can be multiplied by activations of 8 bits, and what the parts of such a weight are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, TypeGuard

import torch
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight, Weight

BLOCK: Final = 32
"""The number of neighbouring inputs of a row of x that share one scale."""

ALL_BITS: Final = frozenset({4, 8})
"""The numbers of bits of the weights that can be multiplied by 8-bit activations."""

SUPER: Final = 256
"""The number of inputs that share a half precision number in factors of two levels."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Contains the parts of a quantised weight that is multiplied by 8-bit activations.

    `kernels.ops.QuantizedWeight` has the shapes. `bias` is the number that makes all whole numbers of the weight
    non-negative when it is added to them. If `table` is not None, the values are indices of these 16 whole numbers.
    """

    values: Tensor
    scales: Tensor
    group_size: int
    bits: int
    bias: int
    super_scales: Tensor | None = None
    offsets: Tensor | None = None
    super_offsets: Tensor | None = None
    zeros: Tensor | None = None
    table: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the values, then the factors: each type of factor is followed by its half precision numbers."""
        return self.values, self.scales, self.super_scales, self.offsets, self.super_offsets, self.zeros

    def matrix(self, index: int) -> Numbers:
        """Returns matrix number `index` of a stack of matrices [E, N, K]."""
        names = ("values", "scales", "super_scales", "offsets", "super_offsets", "zeros")
        parts = zip(names, self.tensors, strict=True)
        return replace(self, **{name: None if part is None else part[index] for name, part in parts})


def takes_int8(weight: Weight, bits: frozenset[int] = ALL_BITS) -> TypeGuard[QuantizedWeight]:
    """Returns whether a weight can be multiplied by 8-bit activations, and its number of bits is one of `bits`.

    Its numbers must be whole numbers of 4 or 8 bits, and a group must have 16 inputs, a multiple of 32, or a whole row.
    """
    if not isinstance(weight, QuantizedWeight) or weight.values.dtype not in (torch.int8, torch.uint8):
        return False
    size = weight.group_size
    return weight.bits in bits and (size == BLOCK // 2 or size % BLOCK == 0 or size >= weight.values.shape[-1])


def numbers_of(weight: QuantizedWeight) -> Numbers:
    """Returns the parts of a weight that the function `takes_int8` accepts."""
    return Numbers(weight.values, weight.scales, weight.group_size, weight.bits, 8 if weight.bits == 4 else 128)
