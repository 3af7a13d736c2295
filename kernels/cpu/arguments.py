"""These functions check each tensor before its address goes to the compiled library. One check takes about 1 us.

The replay of a recorded graph (`graph.py`) runs no checks, so decode steps that replay a graph do not pay for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import refuse


def whole(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has the given dtype and shape and is contiguous in the CPU's memory."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    refuse(name, tensor, f"be {_words(dtype, shape)}, contiguous, in the CPU's memory")


def units(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has the given dtype and shape, lies in the CPU's memory, and has contiguous
    `tensor[i]`. The stride of dimension 0 is arbitrary, as in a slice of a matrix's columns."""
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu
    # The method is_contiguous is faster than the function _is_dense, so it is called first.
    if fits and (tensor.is_contiguous() or _is_dense(shape, tensor.stride())):
        return
    refuse(name, tensor, f"be {_words(dtype, shape)}, contiguous behind dimension 0, in the CPU's memory")


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Returns whether each `tensor[i]` is contiguous. The stride of a dimension of size 1 does not matter."""
    expected = 1
    for i in range(len(shape) - 1, 0, -1):
        if strides[i] != expected and shape[i] != 1:
            return False
        expected *= shape[i]
    return True


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
