"""fp8: quantises weights to float8_e4m3fn (Micikevicius et al. 2022) with one scale for each output row, rounding to
nearest with ties to even.

The distance between neighbouring float8 numbers grows with their magnitude. In a row with a few large weights, the
small weights are therefore more precise than in int8.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS

LIMIT: Final = FORMATS["fp8"].limit


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a float32 array [..., inputs] to float8_e4m3fn. Returns the quantised numbers in an array of the same
    shape, and the scales in an array [...]. A scale is the largest magnitude in its row divided by 448."""
    return quantize_by(weight, weight.abs().amax(-1))


def quantize_by(weight: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises as the function `quantize` does, but takes the largest magnitude of each row from `largest` [...]."""
    scales = largest.unsqueeze(-1) / LIMIT
    # The scale of a row of zeros is set to 1, because 0 would lead to 0/0.
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight / scales).clamp_(-LIMIT, LIMIT).to(torch.float8_e4m3fn), scales.squeeze(-1)
