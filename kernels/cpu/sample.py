"""Sampling from the whole vocabulary in one pass over a row, without temporaries of its size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import INT, POINTER, library
from kernels.ops import SampleInputs
from kernels.reference.sample import sample as sample_by_ranking


class Sample:
    """See `kernels.ops.Sample`. Rows with top_k or top_p go to the reference, for they need a ranking."""

    def __init__(self) -> None:
        self._run = library().function("sample", *[POINTER] * 5, *[INT] * 3)

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """See `kernels.ops.Sample`."""
        rows, size = logits.shape
        least = inputs.min_p.log()
        tokens = logits.new_empty(rows, dtype=torch.int64)
        self._run(
            logits.data_ptr(),
            inputs.temperature.data_ptr(),
            least.data_ptr(),
            inputs.keys.data_ptr(),
            tokens.data_ptr(),
            rows,
            size,
            logits.stride(0),
        )
        ranked = ((inputs.top_k > 0) | (inputs.top_p < 1)) & (inputs.temperature > 0)
        if ranked.any():
            chosen = ranked.nonzero().squeeze(-1)
            tokens[chosen] = sample_by_ranking(logits[chosen], SampleInputs(*(field[chosen] for field in inputs)))
        return tokens
