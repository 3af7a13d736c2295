"""int8: symmetric, one scale for each output row, rounded to nearest."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS

LIMIT: Final = FORMATS["int8"].limit


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., inputs] -> whole numbers [..., inputs] and scales [...], the row's largest magnitude / 127."""
    scales = weight.abs().amax(-1, keepdim=True) / LIMIT
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    return (weight / scales).round_().clamp_(-LIMIT, LIMIT), scales.squeeze(-1)
