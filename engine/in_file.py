"""Tensors that are still in their files, and how compiled code reads them straight into the memory of a model."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.pieces import Piece, cut
from jamba_server.kernels.cpu.read import Failure, Reader, fits
from jamba_server.kernels.ops import KernelUnavailable, QuantizedWeight


class InFile(ABC):
    """A tensor of a file that is not in memory yet. `shape` is the shape that the tensor has in memory."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self) -> Tensor | QuantizedWeight:
        """Returns the tensor. Raises CheckpointError if the file cannot be read."""

    def read_piece(self, piece: Piece) -> Tensor | QuantizedWeight:
        """Returns a piece of the tensor. Raises CheckpointError if the file cannot be read."""
        return cut(self.read(), piece)

    @abstractmethod
    def read_into(self, destination: Tensor | QuantizedWeight) -> bool:
        """Fills `destination`, which has the same shape, straight from the file and returns True, if it has the format
        of the tensor in the file and if compiled code can fill it. Otherwise returns False and reads nothing. Raises
        CheckpointError if the file cannot be read or if a number is infinite or not a number (NaN)."""


def read_directly(
    path: Path,
    name: str,
    destination: Tensor | QuantizedWeight,
    read: Callable[[Reader], Failure | None],
    *,
    is_checked: bool = True,
) -> bool:
    """Calls `read`, which fills `destination` from the file `path`, with the reader of the compiled library. Returns
    False, and does not call `read`, if there is no library or if it cannot fill the destination.

    Raises CheckpointError as the method `InFile.read_into` does; the error mentions the tensor `name`. Numbers need not
    be finite unless `is_checked`."""
    reader = _reader()
    tensors = (destination,) if isinstance(destination, Tensor) else destination
    if reader is None or not all(fits(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
        return False
    try:
        failure = read(reader)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.") from error
    if failure is Failure.SHORTER:
        raise shorter(path)
    if failure is Failure.NOT_FINITE and is_checked:
        raise not_finite(path, name, destination)
    return True


def not_finite(path: Path, name: str, weight: Tensor | QuantizedWeight) -> CheckpointError:
    """Returns the error for a tensor with numbers that are infinite or not a number."""
    what = "holds values" if isinstance(weight, Tensor) else "has scales"
    return CheckpointError(f"{path}: tensor {name} {what} that are infinite or not a number (NaN).")


def shorter(path: Path) -> CheckpointError:
    """Returns the error for a file that ends before a tensor that it had."""
    return CheckpointError(f"{path} has become shorter while it was read. Is a download still running?")


@cache
def _reader() -> Reader | None:
    """Returns the reader of the compiled library, or None if there is no such library."""
    try:
        return Reader()
    except KernelUnavailable:
        return None
