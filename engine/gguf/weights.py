"""Reads the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.blocks import dequantize, unpack
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile, GgufTensor
from jamba_server.engine.gguf.stored import format_of, is_quantized_matrix
from jamba_server.engine.quantization.stored import Read, empty
from jamba_server.kernels.ops import QuantizedWeight

# How many numbers are unpacked at a time. Their intermediate results fit into the caches of a CPU.
_CHUNK: Final = 1 << 18


def read_tensors(file: GgufFile, dtype: torch.dtype) -> Iterator[Read]:
    """Yields the tensors of a file. The tensors of experts are yielded one by one, so that no more than one matrix
    takes memory at a time.

    A quantised matrix is yielded as a QuantizedWeight with exactly the numbers of the file. A matrix of floating-point
    numbers is converted to `dtype`, and all other tensors to float32. Raises CheckpointError for a tensor that Jamba
    does not have, and if the file becomes shorter while it is read.
    """
    for tensor in file.tensors.values():
        tensor.announce()
        if (name := translated(tensor.name)) is None:
            raise CheckpointError(f"{tensor.path}: tensor {shown(tensor.name)} has no place in a Jamba model.")
        if "{}" not in name:
            yield Read(name, _read(name, tensor, tensor.shape, 0, dtype), tensor.path, tensor.num_bytes)
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        size = tensor.num_bytes // experts
        for number in range(experts):
            own = name.format(number)
            yield Read(own, _read(own, tensor, tensor.shape[1:], number * size, dtype), tensor.path, size)


def _read(
    name: str, tensor: GgufTensor, shape: tuple[int, ...], start: int, dtype: torch.dtype
) -> Tensor | QuantizedWeight:
    """Returns the part of `tensor` with the given shape that begins `start` bytes after the tensor's first byte."""
    if is_quantized_matrix(tensor):
        return _quantized(tensor, shape, start)
    return _reshaped(name, _converted(tensor, shape, start, dtype))


def _quantized(tensor: GgufTensor, shape: tuple[int, ...], start: int) -> QuantizedWeight:
    """Returns the numbers of blocks as they are stored."""
    kind = tensor.kind
    weight = empty(format_of(kind), shape, torch.device("cpu"))
    blocks = weight.values.numel() // kind.inputs
    parts = [
        None if part is None else part.numpy().reshape(blocks, -1)
        for part in (weight.values, weight.scales, weight.offsets, weight.super_scales, weight.super_offsets)
    ]
    step = _CHUNK // kind.inputs
    for first in range(0, blocks, step):
        rows = slice(first, min(first + step, blocks))
        data = tensor.read(start + first * kind.num_bytes, (rows.stop - first) * kind.num_bytes)
        for part, found in zip(parts, unpack(kind, data), strict=True):
            if part is not None and found is not None:
                part[rows] = found.reshape(rows.stop - first, -1)
    return weight


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


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor in the form of a Hugging Face checkpoint. A GGUF file has the convolution without its middle
    dimension of size 1, and A = -exp(A_log) instead of A_log."""
    if name.endswith("conv1d.weight") and tensor.ndim == 2:
        return tensor.unsqueeze(1)
    if name.endswith("A_log"):
        return tensor.float().neg().log()
    return tensor
