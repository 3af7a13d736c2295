"""Matrix product with a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight, Weight


def contiguous(weight: Weight) -> Weight:
    """The weight, its rows one after the other."""
    if isinstance(weight, Tensor):
        return weight.contiguous()
    return weight._replace(values=weight.values.contiguous(), scales=weight.scales.contiguous())


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return quantized_product(x, weight, bias)


def quantized_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`product` in float32, group after group as `QuantizedWeight` has it, rounded to x's dtype at the end."""
    size, wide = weight.group_size, x.float()
    total = torch.zeros(x.shape[0], weight.values.shape[0], device=x.device)
    for group in range(weight.scales.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        total += weight.scales[:, group] * F.linear(wide[:, inputs], weight.values[:, inputs].float())
    return (total if bias is None else total + bias.float()).to(x.dtype)


class Linear:
    """See `kernels.ops.Linear`.

    Not exact across batches: the library behind torch picks its order of summation by the number of rows, so that a
    row's last bits may change with it.
    """

    def pack(self, weight: Weight) -> Weight:
        """Keeps the layout."""
        return contiguous(weight)

    def rows(self, weight: Weight, ids: Tensor) -> Tensor:
        """See `kernels.ops.Linear`."""
        if not isinstance(weight, Tensor):
            raise TypeError("weight must not be quantised, for its rows to be embedded with")
        return F.embedding(ids, weight)

    def __call__(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """See `kernels.ops.Linear`."""
        return product(x, weight, bias)
