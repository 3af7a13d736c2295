"""Says which weights can be multiplied by activations of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Self, TypeGuard

import torch

from jamba_server.kernels.ops import QuantizedWeight, Weight

BLOCK: Final = 32
"""The number of neighbouring inputs of a row of x that share one scale."""


class Kind(NamedTuple):
    """A kind of weights: those whose numbers have `bits` bits, with fine or with coarse groups of inputs that share a
    scale. A group is fine if it has at most 32 inputs."""

    bits: int
    is_fine: bool

    @classmethod
    def of(cls, bits: int, group_size: int | None) -> Self:
        """Returns the kind of weights whose groups have `group_size` inputs, or whole rows if it is None."""
        return cls(bits, group_size is not None and group_size <= BLOCK)


ALL_KINDS: Final = frozenset(Kind(bits, is_fine) for bits in (4, 8) for is_fine in (False, True))
"""The kinds of weights that can be multiplied by 8-bit activations."""


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


def int8_parts(parts: Sequence[Weight], kinds: frozenset[Kind]) -> tuple[QuantizedWeight, ...] | None:
    """Returns the weights `parts`, which one kernel multiplies together, if they are to be multiplied by 8-bit
    activations: all of them can be, and one of them is of a kind that is in `kinds`. Otherwise returns None."""
    able = tuple(part for part in parts if takes_int8(part))
    chosen = any(Kind.of(part.bits, part.group_size) in kinds for part in able)
    return able if chosen and len(able) == len(parts) else None
