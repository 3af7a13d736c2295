"""The results of these functions are bitwise reproducible: an element's bits do not depend on the tensor's shape.

torch's add, multiply, divide, exp, log1p and rsqrt have this property. torch's `sum` does not, because its order
follows the shape and the memory layout. On a CPU, torch's `silu`, `sigmoid` and `softplus` do not have it either,
because the ends of a tensor run through another code path than its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Returns the sum over dimension `dim`, added in a fixed order. In the result, this dimension has size 1.

    The second half of the elements is added to the first half, and this is repeated until one element is left.
    """
    while (size := x.shape[dim]) > 1:
        half = size // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, size - half, half)
        x = torch.cat([folded, x.narrow(dim, half, 1)], dim) if size % 2 else folded
    return x


def silu(x: Tensor) -> Tensor:
    """Returns x * sigmoid(x). x is float32."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + exp(x)) of float32 x. If x is above 20, the rounded result is x itself."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x)))
