"""This op adds the residual to x and computes RMSNorm of the sum, in one call to the compiled library."""

from __future__ import annotations

from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, FLOAT, INT, POINTER, library


class RmsNorm:
    """Implements the protocol `kernels.ops.RmsNorm` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("rms_norm", *[POINTER] * 5, *[INT] * 5, FLOAT)

    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the protocol `kernels.ops.RmsNorm` for the arguments and the result."""
        rows, size = shape = x.shape[0], weight.shape[0]
        units("x", x, x.dtype, shape)
        whole("weight", weight, x.dtype, (size,))
        if residual is not None:
            units("residual", residual, x.dtype, shape)
        normed = x.new_empty(rows, size)
        total = x if residual is None else x.new_empty(rows, size)
        self._run(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            total.data_ptr(),
            rows,
            size,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            DTYPES[x.dtype],
            eps,
        )
        return normed, total
