"""Checks of tensors whose addresses go to the compiled library, about a microsecond each.

A graph's replay makes no such calls, so that decode steps of a graph do not pay for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import refuse


def whole(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has this dtype and shape, and is one piece of the CPU's memory."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    refuse(name, tensor, f"be {_words(dtype, shape)}, contiguous, in the CPU's memory")


def units(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has this dtype and shape, and each of its units on dimension 0 is one piece of the
    CPU's memory. The units may be apart by any stride, as the rows of a slice are."""
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu
    if fits and (tensor.is_contiguous() or _is_dense(shape, tensor.stride())):  # the first answers sooner
        return
    refuse(name, tensor, f"be {_words(dtype, shape)}, contiguous behind dimension 0, in the CPU's memory")


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether what lies behind dimension 0 is contiguous. The stride of a dimension of one element does not matter."""
    expected = 1
    for i in range(len(shape) - 1, 0, -1):
        if strides[i] != expected and shape[i] != 1:
            return False
        expected *= shape[i]
    return True


def _words(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
