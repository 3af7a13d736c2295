"""This module multiplies inputs by a weight matrix, quantised or not, with torch's matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight


def contiguous(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """Returns the weight, made contiguous. A tensor is copied only if the tensor is not contiguous."""
    return weight.contiguous() if isinstance(weight, Tensor) else weight.each(lambda tensor: tensor.contiguous())


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Returns x [T, K] times the transpose of the weight [N, K], plus bias [N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if isinstance(weight, StackedWeight):
        outputs = torch.cat([product(x, part) for part in weight.parts], dim=-1)
        return outputs if bias is None else outputs + bias
    return quantized_product(x, weight, bias)


def quantized_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Returns x times the transpose of a quantised weight, plus bias. Sums are in float32; the result has x's dtype.

    The groups are added in ascending order, as `QuantizedWeight` defines the product.
    """
    size, wide = weight.group_size, x.float()
    numbers, factors, shifts = weight.numbers(), weight.factors(), weight.shifts()
    total = torch.zeros(x.shape[0], numbers.shape[0], device=x.device)
    for group in range(factors.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        total += factors[:, group] * F.linear(wide[:, inputs], numbers[:, inputs])
        if shifts is not None:
            total += shifts[:, group] * wide[:, inputs].sum(-1, keepdim=True)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def float_product(x: Tensor, weight: Weight) -> Tensor:
    """Returns x [T, K] times the transpose of the weight [N, K] in float32. The inputs are not changed by this."""
    return product(x.float(), weight.float() if isinstance(weight, Tensor) else weight)


class Linear:
    """Implements the protocol `kernels.ops.Linear`.

    The result is not batch-invariant: the library that torch uses chooses its order of summation by the number of rows,
    so the last bits of a row may change with that number.
    """

    def pack(self, weight: Weight) -> Weight:
        """Returns the weight, made contiguous."""
        if isinstance(weight, StackedWeight):
            return StackedWeight(tuple(contiguous(part) for part in weight.parts))
        return contiguous(weight)

    def rows(self, weight: Weight, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if isinstance(weight, Tensor):
            return F.embedding(ids, weight)
        if isinstance(weight, StackedWeight):
            raise TypeError("weight must be one matrix, for its rows to be embedded with")
        if dtype is None:
            raise TypeError("dtype must be given for rows of a quantised weight")
        return weight.dequantized(ids).to(dtype)

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        return product(x, weight, bias)

    def sums(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        out.copy_(float_product(x, weight))
