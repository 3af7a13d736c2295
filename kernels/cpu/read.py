"""Reads tensors from files into memory with all threads of the compiled library, and unpacks them on the way.

A piece of a file is unpacked while it is still in the processor's caches, and no copy of a whole tensor is made.
"""

from __future__ import annotations

import enum
from typing import Final

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.library import INT, POINTER, library
from jamba_server.kernels.ops import QuantizedWeight

_INTEGER: Final = 3
# The numbers of the C++ enumeration `Element` in `src/read.cpp`.
_ELEMENTS: Final = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: _INTEGER,
    torch.uint8: _INTEGER,
    torch.float8_e4m3fn: 4,
}


class Failure(enum.Enum):
    """What can be wrong with a file: it ends before the tensor, or a floating-point number is infinite or NaN."""

    SHORTER = -1
    NOT_FINITE = -2


class Reader:
    """Reads tensors from open files. `file` is a file's descriptor and `start` an offset in bytes.

    Each method returns None, or what is wrong with the file; the destination is then partly filled. It raises OSError
    if the operating system cannot read the file.
    """

    def __init__(self) -> None:
        """Raises KernelUnavailable if there is no compiled library."""
        native = library()
        self._numbers = native.function("read_numbers", *[INT] * 4, POINTER, result=INT)
        self._nibbles = native.function("read_nibbles", *[INT] * 3, POINTER, result=INT)
        self._blocks = native.function("read_blocks", *[INT] * 4, *[POINTER] * 5, result=INT)

    def numbers(self, file: int, start: int, destination: Tensor) -> Failure | None:
        """Fills a contiguous tensor, whose dtype `fits` accepts, with the bytes of a file."""
        _check(destination)
        return _failure(
            self._numbers(file, start, destination.nbytes, _ELEMENTS[destination.dtype], destination.data_ptr())
        )

    def nibbles(self, file: int, start: int, destination: Tensor) -> Failure | None:
        """Fills a contiguous int8 tensor with an even number of elements from signed numbers of four bits. The first of
        the two numbers in a byte is in the lower four bits."""
        _check(destination)
        require(
            destination.dtype == torch.int8 and destination.numel() % 2 == 0,
            "destination",
            destination,
            "be int8 pairs",
        )
        return _failure(self._nibbles(file, start, destination.numel() // 2, destination.data_ptr()))

    def blocks(self, file: int, start: int, type: int, blocks: int, destination: QuantizedWeight) -> Failure | None:
        """Fills a weight from `blocks` blocks of a GGUF file, whose type has the number `type`.

        The weight has exactly the tensors that the type has, in the dtypes that the type gives them.
        """
        parts = (
            destination.values,
            destination.scales,
            destination.offsets,
            destination.super_scales,
            destination.super_offsets,
        )
        for part in parts:
            if part is not None:
                _check(part)
        return _failure(self._blocks(file, start, type, blocks, *(p if p is None else p.data_ptr() for p in parts)))


def fits(destination: Tensor) -> bool:
    """Returns whether a `Reader` can fill a tensor: it is contiguous, in the CPU's memory, and its dtype is known."""
    return destination.is_cpu and destination.is_contiguous() and destination.dtype in _ELEMENTS


def _check(destination: Tensor) -> None:
    require(fits(destination), "destination", destination, "be contiguous, in the CPU's memory and of a known dtype")


def _failure(status: int) -> Failure | None:
    if status > 0:
        raise OSError(status, "a file cannot be read")
    return Failure(status) if status else None
