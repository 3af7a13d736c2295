"""Reads the tensors of folders in safetensors format, also of those that another tool has quantised to integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.prequantized.layout import Array, Layout, Matrix, Numbers
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.stored import Read, empty
from jamba_server.engine.start.safetensors_file import read_file
from jamba_server.kernels.ops import QuantizedWeight


def read_tensors(paths: Iterable[Path], layout: Layout) -> Iterator[Read]:
    """Yields the tensors of a folder under the names of a Hugging Face checkpoint, one by one. A matrix that `layout`
    lists is yielded at the place of the first of its tensors. The other tensors that `layout` mentions are not
    yielded."""
    first: dict[str, list[str]] = defaultdict(list)
    for name, matrix in layout.matrices.items():
        first[matrix.tensors[0]].append(name)
    for name, plain in layout.plain.items():
        first[plain.tensor].append(name)
    used = layout.unused.union(*(matrix.tensors for matrix in layout.matrices.values()))
    for path in paths:
        for read in read_file(path):
            for own in first.get(read.name, ()):
                if (matrix := layout.matrices.get(own)) is None:
                    weight = torch.from_numpy(layout.plain[own].read())
                    yield Read(own, weight, path, read.num_bytes // len(first[read.name]))
                else:
                    yield Read(own, _weight(own, matrix, path), path, matrix.stored.num_bytes)
            if read.name not in first and read.name not in used:
                yield read


def _weight(name: str, matrix: Matrix, path: Path) -> Tensor | QuantizedWeight:
    numbers = matrix.read()
    if isinstance(numbers, Numbers):
        assert matrix.stored.format is not None, "a matrix without a format is read as plain numbers"
        return _quantized(name, matrix.stored.format, numbers, path)
    return torch.from_numpy(numbers)


def _quantized(name: str, form: Format, numbers: Numbers, path: Path) -> QuantizedWeight:
    """Copies numbers to memory of the given format."""
    weight = empty(form, numbers.values.shape, torch.device("cpu"))
    parts = weight.values, weight.scales, weight.zeros, weight.offsets
    for part, found in zip(parts, numbers, strict=True):
        _fill(name, part, found, path)
    return weight


def _fill(name: str, part: Tensor | None, found: Array | None, path: Path) -> None:
    if part is None or found is None:
        assert part is None, "a loader returns all parts of a format"
        assert found is None, "a loader returns no parts that a format lacks"
        return
    if tuple(part.shape) != found.shape:
        raise CheckpointError(
            f"{path}: the tensors of {name} do not fit together: {list(found.shape)} instead of {list(part.shape)}."
        )
    part.numpy()[...] = found
