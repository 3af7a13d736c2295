"""fp8: float8_e4m3fn (Micikevicius et al. 2022), one scale for each output row, rounded to nearest, ties to even.

Its steps grow with the numbers: a row with a few large weights loses less of the small ones than in int8.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS

LIMIT: Final = FORMATS["fp8"].limit


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., inputs] -> float8_e4m3fn [..., inputs] and scales [...], the row's largest magnitude / 448."""
    scales = weight.abs().amax(-1, keepdim=True) / LIMIT
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    return (weight / scales).clamp_(-LIMIT, LIMIT).to(torch.float8_e4m3fn), scales.squeeze(-1)
