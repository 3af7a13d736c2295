"""Reads the tensors of a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jamba_server.engine.in_file import InFile, read_directly
from jamba_server.engine.pieces import Piece
from jamba_server.engine.quantization.stored import Read
from jamba_server.engine.weight_files import StoredTensor, header, incomplete
from jamba_server.kernels.cpu.read import Reader
from jamba_server.kernels.ops import QuantizedWeight

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_PACKED: Final = ".weight_packed"


def read_file(path: Path) -> Iterator[Read]:
    """Yields the tensors of a file in the order in which they are stored. A tensor is read when it is asked for, which
    must be before the next tensor is asked for.

    If a tensor holds two 4-bit numbers in each byte, as in folders that `jamba convert` has written, it is yielded with
    one number in each byte.
    """
    tensors = header(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise incomplete(path, error) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(tensors, key=lambda name: tensors[name].start):
                stored = tensors[name]
                make = _Nibbles if stored.dtype == "U8" and name.endswith(_PACKED) else _Plain
                yield Read(make.renamed(name), make(name, stored, descriptor, file), path, stored.end - stored.start)
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error
    finally:
        os.close(descriptor)


class _Plain(InFile):
    """A tensor as it is stored. `descriptor` and `file` are the file, opened twice."""

    def __init__(self, name: str, stored: StoredTensor, descriptor: int, file: Any) -> None:
        self.shape = stored.shape
        self._name, self._stored, self._descriptor, self._file = name, stored, descriptor, file

    @staticmethod
    def renamed(name: str) -> str:
        return name

    def read(self) -> Tensor:
        """Returns a view of the memory-mapped file."""
        try:
            return self._file.get_tensor(self._name)
        except SafetensorError as error:
            raise incomplete(self._stored.path, error) from error

    def read_piece(self, piece: Piece) -> Tensor:
        """Reads only the bytes of the piece, as far as the file has them side by side."""
        try:
            tensor = self._file.get_slice(self._name)
            before = (slice(None),) * piece.dim
            parts = [tensor[(*before, slice(start, stop))] for start, stop in piece.ranges]
        except SafetensorError as error:
            raise incomplete(self._stored.path, error) from error
        return parts[0] if len(parts) == 1 else torch.cat(parts, piece.dim)

    def read_into(self, destination: Tensor | QuantizedWeight) -> bool:
        stored = self._stored
        if not isinstance(destination, Tensor) or destination.dtype != _DTYPES.get(stored.dtype):
            return False
        assert destination.nbytes == stored.end - stored.start, "the header's sizes fit together"
        read = partial(Reader.numbers, file=self._descriptor, start=stored.start, destination=destination)
        return read_directly(stored.path, self._name, destination, read)


class _Nibbles(_Plain):
    """A tensor of signed numbers of four bits. The first of the two numbers in a byte is in the lower four bits."""

    def __init__(self, name: str, stored: StoredTensor, descriptor: int, file: Any) -> None:
        super().__init__(name, stored, descriptor, file)
        self.shape = (*stored.shape[:-1], 2 * stored.shape[-1]) if stored.shape else ()

    @staticmethod
    def renamed(name: str) -> str:
        return name.removesuffix("_packed")

    def read(self) -> Tensor:
        signed = super().read().view(torch.int8)
        # Both shifts copy the sign bit of the number.
        low, high = signed << 4 >> 4, signed >> 4
        return torch.stack([low, high], dim=-1).flatten(-2)

    def read_piece(self, piece: Piece) -> Tensor:
        return piece.cut_tensor(self.read())

    def read_into(self, destination: Tensor | QuantizedWeight) -> bool:
        stored = self._stored
        if not isinstance(destination, Tensor) or destination.dtype != torch.int8:
            return False
        assert destination.nbytes == 2 * (stored.end - stored.start), "the header's sizes fit together"
        read = partial(Reader.nibbles, file=self._descriptor, start=stored.start, destination=destination)
        return read_directly(stored.path, self._name, destination, read)
