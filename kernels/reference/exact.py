"""Sums and functions whose bits depend on their operands alone, not on the shape of the tensor around them.

torch's add, multiply, divide, exp, log1p and rsqrt qualify. Its `sum` does not (its order follows shape and memory
layout), nor do `silu`, `sigmoid` and `softplus` on a CPU (the ends of a tensor take another code path than its
middle).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, which is kept with size 1: the upper half is added upon the lower until one is left."""
    while (size := x.shape[dim]) > 1:
        half = size // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, size - half, half)
        x = torch.cat([folded, x.narrow(dim, half, 1)], dim) if size % 2 else folded
    return x


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). float32."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), and x itself above 20, where float32 knows no difference. float32."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x)))
