"""This module computes RMSNorm (Zhang & Sennrich 2019, equation 4), rounded at the same places as JambaRMSNorm.

JambaRMSNorm is the implementation in the library transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.reference.exact import ordered_sum


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See the protocol `kernels.ops.RmsNorm` for the arguments and the result."""
    summed = x if residual is None else x + residual
    wide = summed.float()
    variance = ordered_sum(wide * wide, -1) / summed.shape[-1]
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype), summed
