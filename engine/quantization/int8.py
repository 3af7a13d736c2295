"""int8: quantises symmetrically with one scale for each output row, rounding to nearest."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS

LIMIT: Final = FORMATS["int8"].limit


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises float32 [..., inputs] to whole numbers of the same shape (as float32), and returns them with the scales
    [...]. A scale is the largest magnitude of the row divided by 127."""
    scales = weight.abs().amax(-1, keepdim=True) / LIMIT
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros would have the scale 0
    return (weight / scales).round_().clamp_(-LIMIT, LIMIT), scales.squeeze(-1)
