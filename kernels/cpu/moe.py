"""These ops compute a mixture of experts with the compiled library. Dense feed-forward layers use `SiluAndMul` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library
from jamba_server.kernels.cpu.linear import PackedWeight, Packer
from jamba_server.kernels.ops import QuantizedWeight


class SiluAndMul:
    """Implements the protocol `kernels.ops.SiluAndMul` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("silu_and_mul", POINTER, POINTER, INT, INT, INT, INT)

    def __call__(self, gate_up: Tensor) -> Tensor:
        """See the protocol `kernels.ops.SiluAndMul` for the arguments and the result."""
        rows, size = gate_up.shape[0], gate_up.shape[-1] // 2
        units("gate_up", gate_up, gate_up.dtype, (rows, 2 * size))
        out = gate_up.new_empty(rows, size)
        self._run(gate_up.data_ptr(), out.data_ptr(), rows, size, gate_up.stride(0), DTYPES[gate_up.dtype])
        return out


class Experts(NamedTuple):
    """Contains the packed weights of E experts: gate_up [E, 2F, H] and down [E, H, F].

    In gate_up, the F rows of each expert's gate come before the F rows of its up projection.
    """

    gate_up: PackedWeight
    down: PackedWeight
    num_experts: int


class RunExperts:
    """Implements the protocol `kernels.ops.RunExperts`, at the level that `kernels.cpu.linear.Packer` describes.

    One call reads each expert's weights only once, for all tokens.
    """

    def __init__(self, level: str | None = None) -> None:
        self.packer = Packer(level)
        native, arguments = library(), (POINTER, INT, *(POINTER,) * 5, *(INT,) * 4)
        self._run = native.function("run_experts", *arguments)
        self._run_sums = native.function("run_experts_sums", *arguments)

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Experts:
        """Packs the weights of the experts.

        Raises ValueError if gate_up and down have different dtypes, if one of them is quantised and the other is not,
        or if their shapes do not match.
        """
        packed = Experts(
            self.packer(gate_up), self.packer(down), len(down if isinstance(down, Tensor) else down.values)
        )
        gate, out = packed.gate_up, packed.down
        if gate.dtype != out.dtype:
            raise ValueError(f"the experts' gate_up and down differ in dtype: {gate.dtype} and {out.dtype}")
        if (gate.rows, gate.inputs) != (2 * out.inputs, out.rows) or gate.matrices != out.matrices:
            raise ValueError(
                f"gate_up must be [E, 2F, H] and down [E, H, F]; they are {[gate.matrices, gate.rows, gate.inputs]} "
                f"and {[out.matrices, out.rows, out.inputs]}"
            )
        return packed

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        y = x.new_empty(x.shape[0], experts.down.rows)
        self._mix(self._run, x, experts, weights, ids, y)
        return y

    def sums(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        whole("out", out, torch.float32, (x.shape[0], experts.down.rows))
        self._mix(self._run_sums, x, experts, weights, ids, out)

    def _mix(
        self, run: Callable[..., Any], x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, y: Tensor
    ) -> None:
        experts.gate_up.check(x)
        weights, ids = weights.contiguous(), ids.contiguous()
        tokens, top_k = shape = x.shape[0], ids.shape[-1]
        whole("weights", weights, torch.float32, shape)
        whole("ids", ids, torch.int32, shape)
        run(
            x.data_ptr(),
            x.stride(0),
            experts.gate_up.address,
            experts.down.address,
            weights.data_ptr(),
            ids.data_ptr(),
            y.data_ptr(),
            tokens,
            top_k,
            experts.num_experts,
            DTYPES[x.dtype],
        )
