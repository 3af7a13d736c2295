"""This op samples tokens. The smallest logit that top-k and top-p keep is found without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import INT, POINTER, library
from jamba_server.kernels.ops import SampleInputs

# The number of tokens in the vocabulary must be below this limit. The library stores token ids as float32 numbers, and
# float32 represents integers exactly only up to 2**24.
_MAX_VOCABULARY = 1 << 24
_DTYPES = (
    ("temperature", torch.float32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
    ("top_k", torch.int32),
    ("keys", torch.int64),
)


class Sample:
    """Implements the protocol `kernels.ops.Sample` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("sample", *[POINTER] * 7, *[INT] * 3)

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """See the protocol `kernels.ops.Sample` for the arguments and the result."""
        rows, size = shape = logits.shape[0], logits.shape[-1]
        units("logits", logits, torch.float32, shape)
        require(0 < size < _MAX_VOCABULARY, "logits", logits, "have from 1 to 2**24 - 1 tokens in a row")
        for name, dtype in _DTYPES:
            whole(name, getattr(inputs, name), dtype, (rows,))
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
