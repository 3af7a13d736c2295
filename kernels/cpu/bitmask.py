"""This kernel applies masks of allowed tokens: it sets the logits of all other tokens to minus infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import INT, POINTER, library


class ApplyBitmask:
    """Implements the protocol `kernels.ops.ApplyBitmask` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("apply_bitmask", *[POINTER] * 3, *[INT] * 4)

    def __call__(self, logits: Tensor, masks: Tensor, rows: Tensor) -> None:
        """See the protocol `kernels.ops.ApplyBitmask` for the arguments and the effect."""
        count, size = len(rows), logits.shape[-1]
        units("logits", logits, torch.float32, (logits.shape[0], size))
        units("masks", masks, torch.int32, (count, -(-size // 32)))
        whole("rows", rows, torch.int64, (count,))
        self._run(
            logits.data_ptr(),
            masks.data_ptr(),
            rows.data_ptr(),
            count,
            size,
            logits.stride(0),
            masks.stride(0),
        )
