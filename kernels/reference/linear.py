"""Matrix product with a weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """See `kernels.ops.Linear`.

    Not exact across batches: the library behind torch picks its order of summation by the number of rows, so that a
    row's last bits may change with it.
    """

    def pack(self, weight: Tensor) -> Tensor:
        """Keeps the layout."""
        return weight.contiguous()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `kernels.ops.Linear`."""
        return F.linear(x, weight, bias)
