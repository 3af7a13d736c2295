"""This op runs a Mamba layer's decode step between in_proj and out_proj in one call to the compiled library.

The seven parts of the step run so briefly that seven separate calls would take longer than the computation.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.cpu.conv import CausalConv1dUpdate
from jamba_server.kernels.cpu.library import DTYPES, FLOAT, INT, POINTER, library
from jamba_server.kernels.cpu.linear import Linear, PackedWeight
from jamba_server.kernels.cpu.norm import RmsNorm
from jamba_server.kernels.cpu.scan import SelectiveStateUpdate
from jamba_server.kernels.ops import KernelUnavailable, MambaWeights

_PARTS = (CausalConv1dUpdate, Linear, RmsNorm, SelectiveStateUpdate)


class _Pointers(ctypes.Structure):
    """Holds the addresses and sizes of a layer's weights, in the layout of `MambaWeights` in `src/mamba.cpp`."""

    _fields_ = (
        ("conv_weight", POINTER),
        ("conv_bias", POINTER),
        ("x_proj", POINTER),
        ("dt_norm", POINTER),
        ("b_norm", POINTER),
        ("c_norm", POINTER),
        ("dt_proj", POINTER),
        ("a", POINTER),
        ("d", POINTER),
        ("dt_bias", POINTER),
        ("width", INT),
        ("channels", INT),
        ("states", INT),
        ("rank", INT),
        ("dtype", INT),
        ("eps", FLOAT),
    )


class PackedMamba(NamedTuple):
    """The addresses and sizes of a layer's weights, and the weights themselves, which must live as long."""

    address: int
    channels: int
    dtype: torch.dtype
    pointers: _Pointers
    weights: MambaWeights


class MambaDecode:
    """See `kernels.ops.MambaDecode`. The library's own functions of the parts, so the same bits."""

    def __init__(self, *parts: object) -> None:
        self._run = library().function(
            "mamba_decode", POINTER, POINTER, *[INT] * 2, *[POINTER, INT] * 2, *[POINTER] * 2
        )
        for part, kind in zip(parts, _PARTS, strict=True):
            if not isinstance(part, kind):
                raise KernelUnavailable(f"it replaces kernels.cpu's {kind.__name__}, which was not chosen")

    def pack(self, weights: MambaWeights) -> PackedMamba:
        """See `kernels.ops.MambaDecode`."""
        x_proj: PackedWeight = weights.x_proj
        dt_proj: PackedWeight = weights.dt_proj
        scan, bias = weights.scan, weights.conv_bias
        width, channels = weights.conv_weight.shape
        states, rank, dtype = scan.a.shape[1], len(weights.dt_norm), weights.conv_weight.dtype
        # Never quantised, so `bits` and `group_size` are what `src/mamba.cpp` takes for granted: 0.
        assert (x_proj.rows, x_proj.inputs, x_proj.dtype) == (rank + 2 * states, channels, dtype)
        assert (dt_proj.rows, dt_proj.inputs, dt_proj.dtype) == (channels, rank, dtype)
        pointers = _Pointers(
            conv_weight=weights.conv_weight.data_ptr(),
            conv_bias=None if bias is None else bias.data_ptr(),
            x_proj=x_proj.panels.data_ptr(),
            dt_norm=weights.dt_norm.data_ptr(),
            b_norm=weights.b_norm.data_ptr(),
            c_norm=weights.c_norm.data_ptr(),
            dt_proj=dt_proj.panels.data_ptr(),
            a=scan.a.data_ptr(),
            d=scan.d.data_ptr(),
            dt_bias=scan.dt_bias.data_ptr(),
            width=width,
            channels=channels,
            states=states,
            rank=rank,
            dtype=DTYPES[dtype],
            eps=weights.eps,
        )
        return PackedMamba(ctypes.addressof(pointers), channels, dtype, pointers, weights)

    def __call__(
        self, xz: Tensor, weights: PackedMamba, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor
    ) -> Tensor:
        """See `kernels.ops.MambaDecode`."""
        rows, channels = xz.shape[0], weights.channels
        assert xz.shape[1] == 2 * channels and xz.dtype == weights.dtype
        out = xz.new_empty(rows, channels)
        self._run(
            weights.address,
            xz.data_ptr(),
            xz.stride(0),
            rows,
            conv_state.data_ptr(),
            conv_state.stride(0),
            ssm_state.data_ptr(),
            ssm_state.stride(0),
            state_ids.data_ptr(),
            out.data_ptr(),
        )
        return out
