"""This op samples tokens without sorting the vocabulary: it finds the cut of top-k and top-p digit by digit."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import INT, POINTER, library
from jamba_server.kernels.ops import SampleInputs


class Sample:
    """See `kernels.ops.Sample`."""

    def __init__(self) -> None:
        self._run = library().function("sample", *[POINTER] * 7, *[INT] * 3)

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """See `kernels.ops.Sample`."""
        rows, size = logits.shape
        assert (logits.dtype, inputs.keys.dtype, inputs.top_k.dtype) == (torch.float32, torch.int64, torch.int32)
        tokens = logits.new_empty(rows, dtype=torch.int64)
        self._run(
            logits.data_ptr(),
            inputs.temperature.data_ptr(),
            inputs.top_p.data_ptr(),
            inputs.min_p.data_ptr(),
            inputs.top_k.data_ptr(),
            inputs.keys.data_ptr(),
            tokens.data_ptr(),
            rows,
            size,
            logits.stride(0),
        )
        return tokens
