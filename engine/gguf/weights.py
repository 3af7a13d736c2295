"""Reads the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.blocks import BlockType, Bytes, dequantize
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile, GgufTensor

# The number of numbers that are converted at a time. Their intermediate results take about 20 MiB.
_CHUNK = 1 << 20


class Read(NamedTuple):
    """A tensor that was read, its name, the file that it comes from, and how many bytes it takes in this file."""

    name: str
    tensor: Tensor
    path: Path
    num_bytes: int


def read_tensors(file: GgufFile, dtype: torch.dtype) -> Iterator[Read]:
    """Yields the tensors of a file. A matrix is converted to `dtype`, all other tensors to float32. The tensors of
    experts are yielded one by one, so that no more than one matrix takes memory at a time. Raises CheckpointError for
    a tensor that Jamba does not have."""
    for tensor in file.tensors.values():
        if (name := translated(tensor.name)) is None:
            raise CheckpointError(f"{tensor.path}: tensor {shown(tensor.name)} has no place in a Jamba model.")
        if "{}" not in name:
            converted = _converted(tensor, tensor.data, tensor.shape, dtype)
            yield Read(name, _reshaped(name, converted), tensor.path, len(tensor.data))
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        for number, data in enumerate(tensor.data.reshape(experts, -1)):
            converted = _converted(tensor, data, tensor.shape[1:], dtype)
            yield Read(name.format(number), converted, tensor.path, len(data))


def _converted(tensor: GgufTensor, data: Bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns the numbers in `data` as a tensor. A number is converted to float32 before it is rounded to `dtype`. If
    `dtype` is float16, the result is float32, so that the caller finds numbers beyond the range of float16."""
    if len(shape) < 2 or dtype == torch.float16 or tensor.name.endswith("ssm_a"):
        dtype = torch.float32
    result = torch.empty(shape, dtype=dtype)
    flat = result.view(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        part.copy_(torch.from_numpy(dequantize(tensor.kind, _blocks(tensor.kind, data, start, len(part)))))
    return result


def _blocks(kind: BlockType, data: Bytes, start: int, count: int) -> Bytes:
    """Returns the bytes of the numbers `start` to `start + count - 1`, which are whole blocks."""
    assert start % kind.inputs == 0 and count % kind.inputs == 0, "blocks are converted as a whole"
    return data[start // kind.inputs * kind.num_bytes :][: count // kind.inputs * kind.num_bytes]


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Returns a tensor in the form of a Hugging Face checkpoint. A GGUF file has the convolution without its middle
    dimension of size 1, and A = -exp(A_log) instead of A_log."""
    if name.endswith("conv1d.weight") and tensor.ndim == 2:
        return tensor.unsqueeze(1)
    if name.endswith("A_log"):
        return tensor.float().neg().log()
    return tensor
