"""Copies the inputs of a step from the host to the device in a single transfer, and the results of a step from the
device to the host.

A copy from ordinary memory makes the host wait until the device has done all of its queued work. A copy from pinned
memory does not. torch reuses pinned memory only when the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Each array in a packed copy starts at a multiple of this many bytes, because the kernels need this alignment.
ALIGNMENT = 16

Array = NDArray[Any]
DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Copies C-contiguous arrays to `device` and returns them as tensors. Does not wait for the device. On a CPU the
    tensors share the memory of the arrays."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    if device.type == "meta":  # `Rehearsal` runs steps on the device "meta", which has no memory to copy to
        return cut(torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=device), arrays)
    packed = pack(arrays, torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True))
    return cut(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[Array], packed: Tensor) -> Tensor:
    """Copies the arrays one after the other into `packed`, a uint8 tensor on the host, and returns `packed`. Each array
    starts at a multiple of ALIGNMENT bytes."""
    flat, start = packed.numpy(), 0
    for array in arrays:
        flat[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start += _aligned(array.nbytes)
    return packed


def cut(packed: Tensor, arrays: Sequence[Array], start: int = 0) -> list[Tensor]:
    """Returns views of `packed`, which `pack` filled with `arrays` from the byte `start` on: one view for each array,
    with the shape and dtype of the array."""
    tensors: list[Tensor] = []
    for array in arrays:
        tensors.append(packed[start : start + array.nbytes].view(DTYPES[array.dtype]).view(array.shape))
        start += _aligned(array.nbytes)
    return tensors


def packed_bytes(arrays: Sequence[Array]) -> int:
    return sum(_aligned(array.nbytes) for array in arrays)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class HostCopy:
    """A copy of a tensor from the device to the host, which may still be in progress. If the tensor is on a CPU,
    nothing is copied."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Waits until the copy is done, and returns the elements as a list, nested as deeply as the tensor has
        dimensions."""
        return self._arrived_values().tolist()

    def numpy(self) -> Array:
        """Waits until the copy is done, and returns the elements as an array, which shares the memory of the copy."""
        return self._arrived_values().numpy()

    def _arrived_values(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
