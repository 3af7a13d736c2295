"""Reads the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.blocks import dequantize, unpack
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile, GgufTensor
from jamba_server.engine.gguf.stored import format_of, is_quantized_matrix
from jamba_server.engine.in_file import InFile, read_directly
from jamba_server.engine.quantization.stored import Read, empty, is_like
from jamba_server.kernels.cpu.read import Reader
from jamba_server.kernels.ops import QuantizedWeight

# How many numbers are unpacked at a time. Their intermediate results fit into the caches of a CPU.
_CHUNK: Final = 1 << 18
_DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensors(file: GgufFile, dtype: torch.dtype) -> Iterator[Read]:
    """Yields the tensors of a file, which are read when they are asked for. The tensors of experts are yielded one by
    one, so that no more than one matrix takes memory at a time.

    A quantised matrix is read as a QuantizedWeight with exactly the numbers of the file. A matrix of floating-point
    numbers is converted to `dtype`, and all other tensors to float32. Raises CheckpointError for a tensor that Jamba
    does not have, and if the file becomes shorter while it is read.
    """
    for tensor in file.tensors.values():
        if (name := translated(tensor.name)) is None:
            raise CheckpointError(f"{tensor.path}: tensor {shown(tensor.name)} has no place in a Jamba model.")
        make = _Matrix if is_quantized_matrix(tensor) else _Numbers
        if "{}" not in name:
            yield Read(name, make(name, tensor, tensor.shape, 0, dtype), tensor.path, tensor.num_bytes)
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        size = tensor.num_bytes // experts
        for number in range(experts):
            own = name.format(number)
            yield Read(own, make(own, tensor, tensor.shape[1:], number * size, dtype), tensor.path, size)


class _Matrix(InFile):
    """A quantised matrix. It is the part of `tensor` with the given shape that begins `start` bytes after the tensor's
    first byte."""

    def __init__(self, name: str, tensor: GgufTensor, shape: tuple[int, ...], start: int, dtype: torch.dtype) -> None:
        self.shape = shape
        self._name, self._tensor, self._start = name, tensor, start

    def read(self) -> QuantizedWeight:
        weight = empty(format_of(self._tensor.kind), self.shape, torch.device("cpu"))
        if not self._read_into(weight, is_checked=False):
            self._unpack(weight)
        return weight

    def read_into(self, destination: Tensor | QuantizedWeight) -> bool:
        if isinstance(destination, Tensor):
            return False
        own = empty(format_of(self._tensor.kind), self.shape, torch.device("meta"))
        return is_like(destination, own) and self._read_into(destination, is_checked=True)

    def _read_into(self, destination: QuantizedWeight, *, is_checked: bool) -> bool:
        tensor, kind = self._tensor, self._tensor.kind
        blocks, start = destination.values.numel() // kind.inputs, tensor.start + self._start
        file, number = tensor.file.descriptor, kind.number
        read = partial(Reader.blocks, file=file, start=start, type=number, blocks=blocks, destination=destination)
        return read_directly(tensor.path, self._name, destination, read, is_checked=is_checked)

    def _unpack(self, weight: QuantizedWeight) -> None:
        """Fills `weight` with numpy."""
        kind = self._tensor.kind
        blocks = weight.values.numel() // kind.inputs
        parts = [
            None if part is None else part.numpy().reshape(blocks, -1)
            for part in (weight.values, weight.scales, weight.offsets, weight.super_scales, weight.super_offsets)
        ]
        step = _CHUNK // kind.inputs
        for first in range(0, blocks, step):
            rows = slice(first, min(first + step, blocks))
            start, size = self._start + first * kind.num_bytes, (rows.stop - first) * kind.num_bytes
            for part, found in zip(parts, unpack(kind, self._tensor.read(start, size)), strict=True):
                if part is not None and found is not None:
                    part[rows] = found.reshape(rows.stop - first, -1)


class _Numbers(InFile):
    """A tensor of which the model needs floating-point numbers. The arguments are those of `_Matrix`; a matrix is
    converted to `dtype`."""

    def __init__(self, name: str, tensor: GgufTensor, shape: tuple[int, ...], start: int, dtype: torch.dtype) -> None:
        self.shape = (shape[0], 1, shape[1]) if _is_convolution(name) and len(shape) == 2 else shape
        self._name, self._tensor, self._stored, self._start, self._dtype = name, tensor, shape, start, dtype

    def read(self) -> Tensor:
        numbers = _converted(self._tensor, self._stored, self._start, self._dtype)
        numbers = numbers.reshape(self.shape)
        return numbers.float().neg().log() if self._name.endswith("A_log") else numbers

    def read_into(self, destination: Tensor | QuantizedWeight) -> bool:
        tensor = self._tensor
        if not isinstance(destination, Tensor) or destination.dtype != _DTYPES.get(tensor.kind.name):
            return False
        if self._name.endswith("A_log"):  # the file has other numbers
            return False
        file, start = tensor.file.descriptor, tensor.start + self._start
        read = partial(Reader.numbers, file=file, start=start, destination=destination)
        return read_directly(tensor.path, self._name, destination, read)


def _converted(tensor: GgufTensor, shape: tuple[int, ...], start: int, dtype: torch.dtype) -> Tensor:
    """Returns numbers as a tensor. A number is converted to float32 before it is rounded to `dtype`. If `dtype` is
    float16, the result is float32, so that the caller finds numbers beyond the range of float16."""
    if len(shape) < 2 or dtype == torch.float16 or tensor.name.endswith("ssm_a"):
        dtype = torch.float32
    result, kind = torch.empty(shape, dtype=dtype), tensor.kind
    flat = result.view(-1)
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        data = tensor.read(start + first // kind.inputs * kind.num_bytes, len(part) // kind.inputs * kind.num_bytes)
        part.copy_(torch.from_numpy(dequantize(kind, data)))
    return result


def _is_convolution(name: str) -> bool:
    """Returns whether a tensor is a convolution, which a GGUF file has without its middle dimension of size 1."""
    return name.endswith("conv1d.weight")
