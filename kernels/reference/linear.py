"""This module multiplies inputs by a weight matrix, quantised or not, with torch's matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight, Weight


def contiguous(weight: Weight) -> Weight:
    """Returns the weight, made contiguous. A tensor is copied only if the tensor is not contiguous."""
    if isinstance(weight, Tensor):
        return weight.contiguous()
    return weight._replace(values=weight.values.contiguous(), scales=weight.scales.contiguous())


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Returns x [T, K] times the transpose of the weight [N, K], plus bias [N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return quantized_product(x, weight, bias)


def quantized_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Returns x times the transpose of a quantised weight, plus bias. Sums are in float32; the result has x's dtype.

    The groups are added in ascending order, as `QuantizedWeight` defines the product.
    """
    size, wide = weight.group_size, x.float()
    total = torch.zeros(x.shape[0], weight.values.shape[0], device=x.device)
    for group in range(weight.scales.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        total += weight.scales[:, group] * F.linear(wide[:, inputs], weight.values[:, inputs].float())
    return (total if bias is None else total + bias.float()).to(x.dtype)


class Linear:
    """Implements the protocol `kernels.ops.Linear`.

    The result is not batch-invariant: the library that torch uses chooses its order of summation by the number of rows,
    so the last bits of a row may change with that number.
    """

    def pack(self, weight: Weight) -> Weight:
        """Returns the weight, made contiguous."""
        return contiguous(weight)

    def rows(self, weight: Weight, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, Tensor):
            raise TypeError("weight must not be quantised, for its rows to be embedded with")
        return F.embedding(ids, weight)

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        return product(x, weight, bias)
