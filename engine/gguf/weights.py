"""Reads the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.blocks import BlockType, Bytes, dequantize, unpack
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile, GgufTensor

# The number of numbers that are converted at a time. Their intermediate results take about 20 MiB.
_CHUNK: Final = 1 << 20
NO_GROUPS: Final[Mapping[str, int]] = {}


class Read(NamedTuple):
    """A tensor that was read, its name, the file that it comes from, and how many bytes it takes in this file."""

    name: str
    tensor: Tensor
    path: Path
    num_bytes: int


def read_tensors(file: GgufFile, dtype: torch.dtype, groups: Mapping[str, int] = NO_GROUPS) -> Iterator[Read]:
    """Yields the tensors of a file. A matrix is converted to `dtype`, all other tensors to float32. The tensors of
    experts are yielded one by one, so that no more than one matrix takes memory at a time.

    A matrix whose name is in `groups` is yielded as it is stored: its integers, int8 [N, K], and under the same name
    with "_scale" at the end its scales, float32 [N, K / group], where the group has the number of inputs that `groups`
    says. Raises CheckpointError for a tensor that Jamba does not have.
    """
    for tensor in file.tensors.values():
        if (name := translated(tensor.name)) is None:
            raise CheckpointError(f"{tensor.path}: tensor {shown(tensor.name)} has no place in a Jamba model.")
        if "{}" not in name:
            yield from _read(name, tensor, tensor.data, tensor.shape, dtype, groups.get(name))
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        for number, data in enumerate(tensor.data.reshape(experts, -1)):
            own = name.format(number)
            yield from _read(own, tensor, data, tensor.shape[1:], dtype, groups.get(own))


def _read(
    name: str, tensor: GgufTensor, data: Bytes, shape: tuple[int, ...], dtype: torch.dtype, group: int | None
) -> Iterator[Read]:
    if group is None:
        yield Read(name, _reshaped(name, _converted(tensor, data, shape, dtype)), tensor.path, len(data))
        return
    values, scales = _stored(tensor.kind, data, shape, group)
    yield Read(name, values, tensor.path, len(data))
    yield Read(f"{name}_scale", scales, tensor.path, 0)


def _stored(kind: BlockType, data: Bytes, shape: tuple[int, ...], group: int) -> tuple[Tensor, Tensor]:
    """Returns the integers and the scales in `data`. A group of the file becomes several groups of `group` inputs with
    the same scale."""
    values, count = torch.empty(shape, dtype=torch.int8), kind.group // group
    scales = torch.empty(*shape[:-1], shape[-1] // group)
    flat_values, flat_scales = values.view(-1), scales.view(-1)
    for start in range(0, len(flat_values), _CHUNK):
        part = flat_values[start : start + _CHUNK]
        found = unpack(kind, _blocks(kind, data, start, len(part)))
        part.copy_(torch.from_numpy(found.values.reshape(-1)))
        repeated = torch.from_numpy(found.scales.reshape(-1)).repeat_interleave(count)
        flat_scales[start // group :][: len(repeated)].copy_(repeated)
    return values, scales


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
