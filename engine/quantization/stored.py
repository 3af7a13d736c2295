"""Tensors that are read from a checkpoint, and the memory that quantised matrices of a checkpoint fill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.in_file import InFile
from jamba_server.engine.quantization import SUPER_GROUP, Format
from jamba_server.kernels.ops import QuantizedWeight

# The number of numbers that are converted at a time. Their intermediate results take about 20 MiB.
_CHUNK: Final = 1 << 20


class Read(NamedTuple):
    """A tensor of a checkpoint. `name` is its name in a checkpoint of Hugging Face's format. `weight` is a plain
    tensor, or a quantised matrix [N, K] in the format that the checkpoint's method `stored` says, or one of them that
    is still in its file. `path` is the file that the tensor comes from, and `num_bytes` is how many bytes the tensor
    takes in this file."""

    name: str
    weight: Tensor | QuantizedWeight | InFile
    path: Path
    num_bytes: int

    @property
    def loaded(self) -> Tensor | QuantizedWeight:
        """The tensor in memory."""
        return self.weight.read() if isinstance(self.weight, InFile) else self.weight


def empty(form: Format, shape: Sequence[int], device: torch.device) -> QuantizedWeight:
    """Returns uninitialised memory on `device` for a weight [..., N, K] of whole numbers in the given format. The first
    level of scales of two levels is int8."""
    inputs = shape[-1]
    size = form.group_size or inputs
    groups = (*shape[:-1], -(-inputs // size))
    supers = (*shape[:-1], -(-inputs // SUPER_GROUP))
    is_unsigned, two_levels = form.is_unsigned or form.table is not None, form.scale == "two_levels"
    factor = {"float32": torch.float32, "float16": torch.float16, "two_levels": torch.int8}[form.scale]

    def of(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(sizes), dtype=dtype, device=device)

    return QuantizedWeight(
        values=of(shape, torch.uint8 if is_unsigned else torch.int8),
        scales=of(groups, factor),
        group_size=size,
        bits=form.bits,
        offsets=of(groups, factor) if form.has_offset else None,
        zeros=of(groups, torch.uint8) if form.has_zero else None,
        super_scales=of(supers, torch.float16) if two_levels else None,
        super_offsets=of(supers, torch.float16) if two_levels and form.has_offset else None,
        table=form.table,
    )


def fill(destination: QuantizedWeight, source: QuantizedWeight) -> None:
    """Copies `source` to the memory of `destination`. Both have the same shape. If their formats differ, the format of
    `destination` is one that `common_format` returned for several formats, among them that of `source`."""
    if not is_like(destination, source):
        source = _widened(source, destination.group_size, has_offset=destination.offsets is not None)
    for own, other in zip(destination, source, strict=True):
        if isinstance(own, Tensor):
            assert isinstance(other, Tensor), "formats that are alike have the same tensors"
            assert own.dtype == other.dtype, "formats that are alike have the same dtypes"
            own.copy_(other)


def is_like(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Returns whether two weights of the same shape differ at most in the contents of their tensors."""
    return all(
        x.dtype == y.dtype if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True)
    )


def _widened(weight: QuantizedWeight, group_size: int, *, has_offset: bool) -> QuantizedWeight:
    """Returns the same numbers with int8 values, and with float32 scales and offsets of groups of `group_size`
    inputs."""
    repeats = weight.group_size // group_size
    factors, shifts = weight.factors(), weight.shifts()
    shifts = torch.zeros_like(factors) if shifts is None else shifts
    return QuantizedWeight(
        values=weight.numbers().to(torch.int8),
        scales=factors.repeat_interleave(repeats, -1),
        group_size=group_size,
        bits=8,
        offsets=shifts.repeat_interleave(repeats, -1) if has_offset else None,
    )


def dequantize(weight: QuantizedWeight, destination: Tensor) -> None:
    """Writes the numbers that a quantised weight [N, K] stands for to `destination`, which has the same shape. Each
    number is computed in float32 and then rounded to the dtype of `destination`."""
    step = max(1, _CHUNK // weight.values.shape[-1])
    for start in range(0, len(destination), step):
        rows = slice(start, start + step)
        destination[rows].copy_(weight.each(lambda tensor, rows=rows: tensor[rows]).dequantized())
