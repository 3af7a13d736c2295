"""Describes weights that a checkpoint stores in quantised blocks: small integers, where the integers of some
consecutive inputs share a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jamba_server.engine.quantization import Format


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


def shared_formats(blocks: Mapping[str, Format], products: Sequence[Sequence[str]]) -> tuple[Format, ...] | None:
    """Returns a format for each of several matrix products that one kernel computes together, such as both products of
    a layer of experts. `products` lists the names of the weights in each product, and `blocks` maps each name to the
    format in which the weight is stored.

    One kernel needs the same number of bits for all weights, and one product needs groups of the same size. Numbers of
    4 bits become numbers of 8 bits, and a large group becomes several groups with the same scale; nothing is rounded.
    Returns None if a weight is not in `blocks`.
    """
    found = [[blocks[name] for name in names if name in blocks] for names in products]
    if any(len(formats) < len(names) for formats, names in zip(found, products, strict=True)):
        return None
    bits = max(format.bits for formats in found for format in formats)
    limit = max(format.limit for formats in found for format in formats)
    sizes = (min(format.group_size or 0 for format in formats) for formats in found)
    return tuple(Format(bits=bits, limit=limit, group_size=size) for size in sizes)


def expert_names(prefix: str, num_experts: int) -> tuple[list[str], list[str]]:
    """Returns the names of the weights of all gate and up projections of a layer of experts, and of all down
    projections."""
    gate_up = [f"{prefix}{e}.{name}_proj.weight" for e in range(num_experts) for name in ("gate", "up")]
    return gate_up, [f"{prefix}{e}.down_proj.weight" for e in range(num_experts)]
