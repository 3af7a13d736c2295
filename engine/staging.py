"""Staging: a step's numbers on their way to the device, all of them in one copy.

A copy from ordinary memory makes the host wait for everything that the device still has to do; one from pinned memory
does not. torch hands pinned memory out again only when the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes, of every array in the copy: what kernels are compiled for

Array = NDArray[Any]
DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays (C-contiguous) as tensors on `device`, without waiting for it. On a CPU they share their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    if device.type == "meta":  # where steps are rehearsed
        return cut(torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=device), arrays)
    packed = pack(arrays, torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True))
    return cut(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[Array], packed: Tensor) -> Tensor:
    """Fills `packed`, uint8 on the host, with the arrays, one after the other, each aligned. Returns it."""
    flat, start = packed.numpy(), 0
    for array in arrays:
        flat[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start += _aligned(array.nbytes)
    return packed


def cut(packed: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of `packed` (uint8, aligned) with the shapes and dtypes of `arrays`, in their order."""
    tensors: list[Tensor] = []
    start = 0
    for array in arrays:
        tensors.append(packed[start : start + array.nbytes].view(DTYPES[array.dtype]).view(array.shape))
        start += _aligned(array.nbytes)
    return tensors


def packed_bytes(arrays: Sequence[Array]) -> int:
    return sum(_aligned(array.nbytes) for array in arrays)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class Fetch:
    """Numbers on their way from the device to the host. On a CPU they are there."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
