"""The formats of quantised weights for which the GPU kernels are compiled without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import SUPER_GROUP, QuantizedWeight


class Format(NamedTuple):
    """Describes a format of quantised weights. A `group_size` of 0 means a whole row, and scales in int8 mean two
    levels."""

    values: torch.dtype
    bits: int
    group_size: int
    scales: torch.dtype = torch.float32
    offsets: bool = False
    zeros: bool = False
    table: bool = False

    def empty(self, *shape: int) -> QuantizedWeight:
        """Returns a weight [..., N, K] on the device `meta`, so its tensors have no data."""
        *rows, inputs = shape
        size = self.group_size or inputs

        def tensor(group: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*rows, -(-inputs // group), dtype=dtype, device="meta")

        two_levels, offsets = self.scales == torch.int8, self.offsets
        return QuantizedWeight(
            tensor(1, self.values),
            tensor(size, self.scales),
            size,
            self.bits,
            offsets=tensor(size, self.scales) if offsets else None,
            zeros=tensor(size, torch.uint8) if self.zeros else None,
            super_scales=tensor(SUPER_GROUP, torch.float16) if two_levels else None,
            super_offsets=tensor(SUPER_GROUP, torch.float16) if two_levels and offsets else None,
            table=(0.0,) * 16 if self.table else None,
        )


FORMATS = {
    "int8": Format(torch.int8, 8, 0),
    "fp8": Format(torch.float8_e4m3fn, 8, 0),
    "int4": Format(torch.int8, 4, 128),
    "Q8_0": Format(torch.int8, 8, 32, torch.float16),
    "Q4_0": Format(torch.int8, 4, 32, torch.float16),
    "Q4_1": Format(torch.uint8, 4, 32, torch.float16, offsets=True),
    "Q2_K": Format(torch.uint8, 4, 16, torch.int8, offsets=True),
    "Q3_K": Format(torch.int8, 4, 16, torch.int8),
    "Q4_K": Format(torch.uint8, 4, 32, torch.int8, offsets=True),
    "Q5_K": Format(torch.uint8, 8, 32, torch.int8, offsets=True),
    "Q6_K": Format(torch.int8, 8, 16, torch.int8),
    "IQ4_NL": Format(torch.uint8, 4, 32, torch.float16, table=True),
    "NF4": Format(torch.uint8, 4, 64, table=True),
    "AWQ": Format(torch.uint8, 4, 128, torch.float16, zeros=True),
    "MLX, 4 bits": Format(torch.uint8, 4, 64, offsets=True),
    "MLX, 8 bits": Format(torch.uint8, 8, 64, offsets=True),
    "asymmetric int8": Format(torch.uint8, 8, 32, torch.float16, zeros=True),
}
