"""These functions check a tensor before the compiled library receives the tensor's address.

One check takes about 1 microsecond.

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
    """Raises ValueError unless the tensor has the given dtype and shape and lies in the CPU's memory, and unless
    `tensor[i]` is contiguous for each index i. The stride of dimension 0 is arbitrary, so that the tensor may consist
    of some of the columns of a matrix."""
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu
    # The method `is_contiguous` is called first, because this method is faster than the function `_is_dense`.
    if fits and (tensor.is_contiguous() or _is_dense(shape, tensor.stride())):
        return
    refuse(name, tensor, f"be {_words(dtype, shape)}, contiguous behind dimension 0, in the CPU's memory")


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Returns whether `tensor[i]` is contiguous for each index i, where the tensor has these strides.

    The stride of a dimension of size 1 does not matter.
    """
    expected = 1
    for i in range(len(shape) - 1, 0, -1):
        if strides[i] != expected and shape[i] != 1:
            return False
        expected *= shape[i]
    return True


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
