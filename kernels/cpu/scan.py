"""These ops compute the selective scan in compiled code.

The code processes one SIMD vector of channels at a time and keeps the states of these channels in registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library
from jamba_server.kernels.cpu.segments import SEGMENTS, one_row_each, ragged
from jamba_server.kernels.ops import ScanInputs, ScanWeights, Segments


class _Recurrence:
    def __init__(self) -> None:
        self._run = library().function("selective_scan", *[POINTER] * 10, *[INT] * 8, *SEGMENTS, INT)

    def _call(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: tuple[Any, ...]) -> Tensor:
        channels, states = weights.a.shape
        _check(inputs, weights, ssm_state)
        out = inputs.u.new_empty(inputs.u.shape[0], channels)
        self._run(
            *(tensor.data_ptr() for tensor in inputs),
            *(tensor.data_ptr() for tensor in weights),
            ssm_state.data_ptr(),
            out.data_ptr(),
            channels,
            states,
            *(tensor.stride(0) for tensor in inputs),
            ssm_state.stride(0),
            *segments,
            DTYPES[inputs.u.dtype],
        )
        return out


def _check(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor) -> None:
    """Raises ValueError unless each tensor has the dtype, shape and strides that the library requires."""
    (channels, states), rows, dtype = weights.a.shape, inputs.u.shape[0], inputs.u.dtype
    for name, tensor in zip(ScanInputs._fields, inputs, strict=True):
        units(name, tensor, dtype, (rows, states if name in ("b", "c") else channels))
    whole("a", weights.a, torch.float32, (channels, states))
    whole("d", weights.d, torch.float32, (channels,))
    whole("dt_bias", weights.dt_bias, torch.float32, (channels,))
    units("ssm_state", ssm_state, torch.float32, (ssm_state.shape[0], channels, states))


class SelectiveScan(_Recurrence):
    """Implements the protocol `kernels.ops.SelectiveScan` with the compiled library."""

    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
        """See the protocol `kernels.ops.SelectiveScan` for the arguments and the result."""
        return self._call(inputs, weights, ssm_state, ragged(segments))


class SelectiveStateUpdate(_Recurrence):
    """Implements the protocol `kernels.ops.SelectiveStateUpdate`.

    The results have the same bits as those of `SelectiveScan`.
    """

    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.SelectiveStateUpdate` for the arguments and the result."""
        return self._call(inputs, weights, ssm_state, one_row_each(state_ids, inputs.u))
