"""These ops compute the short causal convolution in compiled code.

The code processes one SIMD vector of channels at a time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library
from jamba_server.kernels.cpu.segments import SEGMENTS, one_row_each, ragged
from jamba_server.kernels.ops import Segments


class _Convolution:
    def __init__(self) -> None:
        self._run = library().function("causal_conv1d", *[POINTER] * 5, *[INT] * 4, *SEGMENTS, INT)

    def _call(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: tuple[Any, ...]
    ) -> Tensor:
        width, channels = weight.shape
        units("x", x, x.dtype, (x.shape[0], channels))
        whole("weight", weight, x.dtype, (width, channels))
        if bias is not None:
            whole("bias", bias, x.dtype, (channels,))
        units("conv_state", conv_state, x.dtype, (conv_state.shape[0], width - 1, channels))
        out = x.new_empty(x.shape[0], channels)
        self._run(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            conv_state.data_ptr(),
            out.data_ptr(),
            channels,
            width,
            x.stride(0),
            conv_state.stride(0),
            *segments,
            DTYPES[x.dtype],
        )
        return out


class CausalConv1d(_Convolution):
    """Implements the protocol `kernels.ops.CausalConv1d` with the compiled library."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments
    ) -> Tensor:
        """See the protocol `kernels.ops.CausalConv1d` for the arguments and the result."""
        return self._call(x, weight, bias, conv_state, ragged(segments))


class CausalConv1dUpdate(_Convolution):
    """Implements the protocol `kernels.ops.CausalConv1dUpdate`.

    The results have the same bits as those of `CausalConv1d`.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.CausalConv1dUpdate` for the arguments and the result."""
        return self._call(x, weight, bias, conv_state, one_row_each(state_ids, x))
