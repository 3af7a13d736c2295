"""int8: quantises weights symmetrically with one scale for each output row, rounding to nearest."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS

LIMIT: Final = FORMATS["int8"].limit


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a float32 array [..., inputs] to whole numbers. Returns these numbers, stored as float32 in an array of
    the same shape, and the scales in an array [...]. A scale is the largest magnitude in its row divided by 127."""
    return quantize_by(weight, weight.abs().amax(-1))


def quantize_by(weight: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises as the function `quantize` does, but takes the largest magnitude of each row from `largest` [...]."""
    scales = largest.unsqueeze(-1) / LIMIT
    # The scale of a row of zeros is set to 1, because 0 would lead to 0/0.
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight / scales).round_().clamp_(-LIMIT, LIMIT), scales.squeeze(-1)
