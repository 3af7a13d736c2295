"""Products of quantised weights with activations of 8 bits, in plain torch. The results are batch-invariant.

Every 32 neighbouring inputs of a row of x are a block with one scale, and a weight has factors for each group of
inputs. In this order, all in float32 and with fused multiply-adds:

    scale = largest |x| of the block / 127; q = x / scale, rounded to the nearest whole number
    c = sum over the blocks of a group of (sum of q * number) * scale; the inner sum has whole numbers only
    t = sum over the blocks of a group of (sum of q) * scale
    y = sum over the groups of factor * (c - zero * t) + offset * t

If a group has 16 inputs, each half of a block is a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels import ops
from jamba_server.kernels.int8_activations import ALL_KINDS, BLOCK, Kind, int8_parts
from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight
from jamba_server.kernels.reference.moe import run_each

SMALLEST_SCALE = 2.0**-126  # A smaller scale would not have the full precision of float32, so that it counts as zero.


class Blocks(NamedTuple):
    """Contains quantised inputs: q, float64 whole numbers [T, blocks, 32], and the scales, float32 [T, blocks]."""

    q: Tensor
    scales: Tensor


def quantize_inputs(x: Tensor) -> Blocks:
    """Quantises x [T, K]. If K is not a multiple of 32, the missing inputs are zeros.

    The scale of a block with an infinity or a NaN is NaN, which makes the whole row of the product NaN.
    """
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = padded.abs().amax(-1) / 127
    scales = torch.where(scales < SMALLEST_SCALE, 0.0, scales)
    usable = ((scales > 0) & scales.isfinite())[..., None]
    q = torch.where(usable, (padded / torch.where(usable, scales[..., None], 1.0)).round(), 0.0)
    return Blocks(q.double(), torch.where(scales.isfinite(), scales, torch.nan))


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns a * b + c for float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to float64 so that its last bit is 1 if it is not exact ("round
    to odd"). The second rounding, to float32, then gives the nearest number to the exact sum.
    """
    product, wide = a.double() * b.double(), c.double()
    product, wide = torch.broadcast_tensors(product, wide)
    total = product + wide
    virtual = total - product
    error = (product - (total - virtual)) + (wide - virtual)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)  # the step to the neighbour in the direction of the error
    inexact = (error != 0) & error.isfinite() & (bits % 2 == 0)
    return torch.where(inexact, bits + away, bits).view(torch.float64).float()


def a8_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Returns x [T, K] times the transpose of the weight [N, K], plus bias [N], in x's dtype."""
    inputs, size = x.shape[1], min(weight.group_size, x.shape[1])
    numbers = weight._replace(zeros=None).numbers().double()
    numbers = torch.nn.functional.pad(numbers, (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
    factors, shifts = weight.factors(), weight.shifts()
    q, scales = quantize_inputs(x)
    half = BLOCK if size == inputs or size % BLOCK == 0 else BLOCK // 2
    total = torch.zeros(len(x), len(numbers))
    for group in range(-(-inputs // size)):
        c, t = torch.zeros_like(total), torch.zeros(len(x), 1)
        for start in range(group * size, min((group + 1) * size, inputs), half):
            block, part = start // BLOCK, slice(start % BLOCK, start % BLOCK + half)
            scale = scales[:, block, None]
            c = fused((q[:, block, part] @ numbers[:, block, part].T).float(), scale, c)
            t = fused(q[:, block, part].sum(-1, keepdim=True).float(), scale, t)
        if weight.zeros is not None:
            c = fused(-weight.zeros[:, group].float(), t, c)
        total = fused(factors[:, group], c, total)
        if shifts is not None:
            total = fused(shifts[:, group], t, total)
    return (total if bias is None else total + bias.float()).to(x.dtype)


class A8Weights(NamedTuple):
    """Contains one or more matrices that are multiplied by the same 8-bit activations. Their outputs are joined."""

    parts: tuple[QuantizedWeight, ...]


class Linear:
    """Implements the protocol `kernels.ops.Linear`: with 8-bit activations for the weights that
    `kernels.int8_activations.int8_parts` chooses, and with the implementation `other` for all other weights."""

    def __init__(self, other: ops.Linear, kinds: frozenset[Kind] = ALL_KINDS) -> None:
        self._other, self._kinds = other, kinds

    @property
    def other(self) -> ops.Linear:
        """Returns the implementation of the products with activations of the model's dtype."""
        return self._other

    def pack(self, weight: Weight) -> Any:
        """Returns weights for 8-bit activations, or what `other.pack` returns."""
        parts = int8_parts(weight.parts if isinstance(weight, StackedWeight) else (weight,), self._kinds)
        return self._other.pack(weight) if parts is None else A8Weights(parts)

    def rows(self, weight: Any, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, A8Weights):
            return self._other.rows(weight, ids, dtype)
        return weight.parts[0].dequantized(ids).to(dtype)

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, A8Weights):
            return self._other(x, weight, bias)
        biases = [None] * len(weight.parts) if bias is None else bias.split([len(part.values) for part in weight.parts])
        return torch.cat([a8_product(x, part, own) for part, own in zip(weight.parts, biases, strict=True)], dim=1)

    def sums(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """See the protocol `kernels.ops.Linear`. The weight is one that `other.pack` has packed."""
        self._other.sums(x, weight, out)


class Experts(NamedTuple):
    """Contains two weights for each expert: gate_up [2F, H] and down [H, F]."""

    gate_up: tuple[QuantizedWeight, ...]
    down: tuple[QuantizedWeight, ...]


def _matrices(weight: QuantizedWeight) -> tuple[QuantizedWeight, ...]:
    """Splits a weight [E, N, K] into E matrices [N, K]."""
    return tuple(weight.each(lambda part, i=i: part[i]) for i in range(len(weight.values)))


class RunExperts:
    """Implements the protocol `kernels.ops.RunExperts`: with 8-bit activations for the weights that
    `kernels.int8_activations.int8_parts` chooses, and with the implementation `other` for all other weights."""

    def __init__(self, other: ops.RunExperts, kinds: frozenset[Kind] = ALL_KINDS) -> None:
        self._other, self._kinds = other, kinds

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Any:
        """Returns the parts of each expert's weights, or what `other.pack` returns."""
        parts = int8_parts((gate_up, down), self._kinds)
        return self._other.pack(gate_up, down) if parts is None else Experts(*map(_matrices, parts))

    def __call__(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        if not isinstance(experts, Experts):
            return self._other(x, experts, weights, ids)
        return run_each(x, experts.gate_up, experts.down, weights, ids, a8_product)

    def sums(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """See the protocol `kernels.ops.RunExperts`. The experts are those that `other.pack` has packed."""
        self._other.sums(x, experts, weights, ids, out)
