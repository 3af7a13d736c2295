"""Quantises weights with the compiled library. The results have the same bits as those of plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library


class QuantizeInt8:
    """Quantises the rows of a weight to whole numbers from -127 to 127. Raises KernelUnavailable if there is no
    compiled library."""

    def __init__(self) -> None:
        self._run = library().function("quantize_int8", *[POINTER] * 3, *[INT] * 3)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers, int8 [N, K], and the scales, float32 [N, 1], of finite numbers [N, K].

        A scale is the largest magnitude in its row divided by 127, or 1 for a row of zeros. Raises ValueError unless
        the tensor is contiguous, in the CPU's memory and of a dtype of `DTYPES`.
        """
        require(rows.is_cpu and rows.dim() == 2 and rows.is_contiguous(), "rows", rows, "be contiguous on a CPU")
        values, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows), 1)
        self._run(rows.data_ptr(), values.data_ptr(), scales.data_ptr(), len(rows), rows.shape[1], DTYPES[rows.dtype])
        return values, scales
