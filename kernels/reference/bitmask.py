"""This kernel applies masks of allowed tokens: it sets the logits of all other tokens to minus infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_bitmask(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """See the protocol `kernels.ops.ApplyBitmask` for the arguments and the effect."""
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (masks[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
