"""Describes matrices that a checkpoint stores quantised, each in a format of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jamba_server.engine.quantization import SUPER_GROUP, Format


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantised matrix in a file. `kind` is the name of its type in the file format, such as "Q4_K". `format` is the
    kernels' format that represents the stored numbers exactly, or None if there is no such format. In that case the
    matrix is converted to floating-point numbers. The matrix has `numbers` numbers and takes `num_bytes` bytes in the
    file."""

    kind: str
    format: Format | None
    numbers: int
    num_bytes: int


def common_format(formats: Iterable[Format]) -> Format | None:
    """Returns one format that represents the numbers of matrices in all of `formats` exactly. Returns None if there is
    no such format.

    If the formats differ, the numbers become integers from -128 to 127 with float32 scales. A group of inputs of one
    format becomes several groups with the same scale.
    """
    found = set(formats)
    if len(found) == 1:
        return found.pop()
    if not all(map(_fits_int8, found)):
        return None
    size = min(form.group_size or 0 for form in found)
    has_offset = any(form.has_offset for form in found)
    return Format(bits=8, limit=127, group_size=size, has_offset=has_offset)


def _fits_int8(form: Format) -> bool:
    """Returns whether the numbers of a format are integers from -128 to 127 in groups of 16, 32, 64, 128 or 256."""
    is_group = form.group_size is not None and form.group_size >= 16 and SUPER_GROUP % form.group_size == 0
    integers = form.limit <= 127 if form.table is None else all(number == int(number) for number in form.table)
    return is_group and integers and not form.has_zero


def expert_names(prefix: str, num_experts: int) -> tuple[list[str], list[str]]:
    """Returns the names of the weights of all gate and up projections of a layer of experts, and of all down
    projections."""
    gate_up = [f"{prefix}{e}.{name}_proj.weight" for e in range(num_experts) for name in ("gate", "up")]
    return gate_up, [f"{prefix}{e}.down_proj.weight" for e in range(num_experts)]
