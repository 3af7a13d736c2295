"""For decode steps, this op computes the part of a Mamba layer between in_proj and out_proj in one call to the library.

This part consists of seven kernels. Each kernel is so short that seven calls from Python would take longer than the
computation.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.conv import CausalConv1dUpdate
from jamba_server.kernels.cpu.library import DTYPES, FLOAT, INT, POINTER, library
from jamba_server.kernels.cpu.linear import Linear, PackedWeight
from jamba_server.kernels.cpu.norm import RmsNorm
from jamba_server.kernels.cpu.scan import SelectiveStateUpdate
from jamba_server.kernels.ops import KernelUnavailable, MambaWeights

_PARTS = (CausalConv1dUpdate, Linear, RmsNorm, SelectiveStateUpdate)


class _Pointers(ctypes.Structure):
    """Contains the addresses and sizes of a Mamba layer's weights.

    The memory layout is that of the C++ struct `MambaWeights` in `src/mamba.cpp`.
    """

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
    """Contains the weights of a Mamba layer, and the addresses and sizes of these weights, which the library reads.

    The field `address` is the address of `pointers`. Keeping the tensors in `weights` alive keeps the addresses valid.

    `sizes` is (width of the convolution, number of SSM states per channel).
    """

    address: int
    channels: int
    sizes: tuple[int, int]
    dtype: torch.dtype
    pointers: _Pointers
    weights: MambaWeights


class MambaDecode:
    """Implements the protocol `kernels.ops.MambaDecode`. The compiled code calls the functions of the separate ops.

    The results have the same bits as those of the separate ops.
    """

    def __init__(self, *parts: object) -> None:
        self._run = library().function(
            "mamba_decode", POINTER, POINTER, *[INT] * 2, *[POINTER, INT] * 2, *[POINTER] * 2
        )
        for part, kind in zip(parts, _PARTS, strict=True):
            if not isinstance(part, kind):
                raise KernelUnavailable(f"it replaces kernels.cpu's {kind.__name__}, which was not chosen")

    def pack(self, weights: MambaWeights) -> PackedMamba:
        """See the protocol `kernels.ops.MambaDecode` for the arguments and the result."""
        x_proj: PackedWeight = weights.x_proj
        dt_proj: PackedWeight = weights.dt_proj
        scan, bias = weights.scan, weights.conv_bias
        width, channels = weights.conv_weight.shape
        states, rank, dtype = scan.a.shape[1], len(weights.dt_norm), weights.conv_weight.dtype
        _check(weights)
        pointers = _Pointers(
            conv_weight=weights.conv_weight.data_ptr(),
            conv_bias=None if bias is None else bias.data_ptr(),
            x_proj=x_proj.address,
            dt_norm=weights.dt_norm.data_ptr(),
            b_norm=weights.b_norm.data_ptr(),
            c_norm=weights.c_norm.data_ptr(),
            dt_proj=dt_proj.address,
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
        return PackedMamba(ctypes.addressof(pointers), channels, (width, states), dtype, pointers, weights)

    def __call__(
        self, xz: Tensor, weights: PackedMamba, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor
    ) -> Tensor:
        """See the protocol `kernels.ops.MambaDecode` for the arguments and the result."""
        rows, channels, (width, states) = xz.shape[0], weights.channels, weights.sizes
        units("xz", xz, weights.dtype, (rows, 2 * channels))
        units("conv_state", conv_state, weights.dtype, (conv_state.shape[0], width - 1, channels))
        units("ssm_state", ssm_state, torch.float32, (ssm_state.shape[0], channels, states))
        whole("state_ids", state_ids, torch.int32, (rows,))
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


def _check(weights: MambaWeights) -> None:
    """Raises ValueError unless the library can read all of the weights."""
    (channels, states), rank, dtype = weights.scan.a.shape, len(weights.dt_norm), weights.conv_weight.dtype
    whole("conv_weight", weights.conv_weight, dtype, (weights.conv_weight.shape[0], channels))
    if weights.conv_bias is not None:
        whole("conv_bias", weights.conv_bias, dtype, (channels,))
    for name, norm, size in (
        ("dt_norm", weights.dt_norm, rank),
        ("b_norm", weights.b_norm, states),
        ("c_norm", weights.c_norm, states),
    ):
        whole(name, norm, dtype, (size,))
    whole("a", weights.scan.a, torch.float32, (channels, states))
    whole("d", weights.scan.d, torch.float32, (channels,))
    whole("dt_bias", weights.scan.dt_bias, torch.float32, (channels,))
    for name, weight, expected in (
        ("x_proj", weights.x_proj, (rank + 2 * states, channels)),
        ("dt_proj", weights.dt_proj, (channels, rank)),
    ):
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"{name} must be packed by kernels.cpu's Linear; it is a {type(weight).__name__}")
        if (weight.rows, weight.inputs) != expected or weight.dtype not in (None, dtype):
            raise ValueError(
                f"{name} must be {expected}, quantised or {dtype}; it is {(weight.rows, weight.inputs)} {weight.dtype}"
            )
