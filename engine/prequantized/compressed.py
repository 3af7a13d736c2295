"""Reads folders of llm-compressor in the formats pack-quantized and int-quantized of compressed-tensors: integers of 4
or 8 bits.

In pack-quantized, a module with K inputs and N outputs has weight_packed, int32 [N, K * bits / 32], whose lowest bits
hold the first input; weight_shape with N and K; weight_scale [N, G]; and, unless it is symmetric, weight_zero_point,
int32 [N * bits / 32, G], whose words hold consecutive outputs, or int8 [N, G]. Packed numbers are stored plus 8, or
plus 128 for 8 bits. In int-quantized, a module has weight, int8 [N, K], and zero points in int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, NamedTuple, cast

import numpy as np

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.prequantized.arrays import (
    FLOATS,
    dequantized,
    read_array,
    scale_of,
    unpack_columns,
    unpack_rows,
)
from jamba_server.engine.prequantized.layout import Array, Layout, Matrix, Numbers, Tensors, require
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Format, Scale
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.quantization.compressed_tensors import ConfigReader, is_named
from jamba_server.engine.quantization.methods import COMPRESSED_TENSORS
from jamba_server.engine.weight_files import StoredTensor

_PACKED, _PLAIN, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_PACKED_END: Final = ".weight_packed"
_SCALE_END: Final = ".weight_scale"
MARKS: Final = (_SCALE_END,)
_ACTIVATIONS: Final = ("input_scale", "input_zero_point", "input_global_scale")


class _Group(NamedTuple):
    """The scheme of the modules that `targets` match. `size` is None if a whole row shares a scale."""

    targets: list[str]
    bits: int
    size: int | None
    is_symmetric: bool
    has_activations: bool


def recognises(settings: Settings) -> bool:
    """Returns whether the settings are those of integers. Settings with the format float-quantized, or without a
    format, are those of 8-bit floats, which another module reads."""
    groups = settings.values.get("config_groups")
    schemes = list(cast(dict[str, Any], groups).values()) if isinstance(groups, dict) else []
    found = [scheme.get("format") for scheme in [settings.values, *schemes] if isinstance(scheme, Mapping)]
    return settings.method == COMPRESSED_TENSORS and (_PACKED in found or _PLAIN in found)


def layout(settings: Settings, tensors: Tensors) -> Layout:
    reader = ConfigReader(settings.path)
    groups = _groups(reader, settings.values)
    matrices: dict[str, Matrix] = {}
    unused: set[str] = set()
    for name, tensor in tensors.items():
        module = name.removesuffix(_SCALE_END)
        if name.endswith(_SCALE_END) and f"{module}{_PACKED_END}" in tensors:
            matrices[f"{module}.weight"] = _packed(tensors, module, _group_of(module, groups, tensor))
        elif name.endswith(_SCALE_END):
            matrices[f"{module}.weight"] = _unpacked(tensors, module, _group_of(module, groups, tensor))
        elif name.rpartition(".")[2] in _ACTIVATIONS:
            unused.add(name)
    notes = ("the folder's rounding of activations to 8 bits is not followed: activations keep the model's dtype",)
    return Layout(matrices, unused=frozenset(unused), notes=notes if any(g.has_activations for g in groups) else ())


def usual(settings: Settings, module: str) -> tuple[str, Format]:
    groups = _groups(ConfigReader(settings.path), settings.values)
    group = next((group for group in groups if is_named(module, group.targets, "Linear")), groups[0])
    return _kind(group), _format(group, "float32")


def _kind(group: _Group) -> str:
    return f"int{group.bits} of compressed-tensors"


def _format(group: _Group, scale: Scale) -> Format:
    return Format(
        bits=group.bits,
        limit=2 ** (group.bits - 1) - 1 if group.is_symmetric else 2**group.bits - 1,
        group_size=group.size,
        scale=scale,
        is_unsigned=not group.is_symmetric,
        has_zero=not group.is_symmetric,
    )


def _groups(reader: ConfigReader, values: Mapping[str, Any]) -> list[_Group]:
    reader.expect("format", values.get("format"), _PACKED, _PLAIN, _MIXED, None)
    reader.expect("quantization_status", values.get("quantization_status"), "compressed", None)
    reader.check_extras(values)
    groups = reader.mapping("config_groups", values.get("config_groups"))
    if not groups:
        reader.refuse("config_groups", groups, "at least one group is expected")
    return [_group(reader, f"config_groups.{name}", reader.mapping(name, group)) for name, group in groups.items()]


def _group(reader: ConfigReader, key: str, group: Mapping[str, Any]) -> _Group:
    reader.expect(f"{key}.format", group.get("format"), _PACKED, _PLAIN, None)
    reader.expect(f"{key}.output_activations", group.get("output_activations"), None)
    weights = reader.mapping(f"{key}.weights", group.get("weights"))
    reader.expect(f"{key}.weights.num_bits", weights.get("num_bits"), 4, 8)
    reader.expect(f"{key}.weights.type", weights.get("type"), "int", None)
    reader.expect(f"{key}.weights.strategy", weights.get("strategy"), "group", "channel")
    reader.expect(f"{key}.weights.symmetric", weights.get("symmetric"), True, False, None)
    reader.expect(f"{key}.weights.dynamic", weights.get("dynamic"), False, None)
    size = weights.get("group_size")
    if weights["strategy"] == "channel":
        size = None
    elif not isinstance(size, int) or size < 8 or size % 8:
        reader.refuse(f"{key}.weights.group_size", size, "a multiple of 8 is expected")
    return _Group(
        targets=reader.patterns(f"{key}.targets", group.get("targets")),
        bits=weights["num_bits"],
        size=size,
        is_symmetric=weights.get("symmetric") is not False,
        has_activations=group.get("input_activations") is not None,
    )


def _group_of(module: str, groups: list[_Group], tensor: StoredTensor) -> _Group:
    found = next((group for group in groups if is_named(module, group.targets, "Linear")), None)
    if found is None:
        raise CheckpointError(
            f"{tensor.path}: tensor {shown(module + _SCALE_END)} belongs to no target of "
            "quantization_config.config_groups in config.json."
        )
    return found


def _packed(tensors: Tensors, module: str, group: _Group) -> Matrix:
    words = require(tensors, f"{module}{_PACKED_END}", ("I32",), (None, None))
    shape = require(tensors, f"{module}.weight_shape", ("I64", "I32"), (2,))
    rows, inputs = (int(size) for size in read_array(shape))
    if rows != words.shape[0] or inputs < 1 or -(-inputs * group.bits // 32) != words.shape[1]:
        raise CheckpointError(
            f"{words.path}: tensor {module}.weight_shape is [{rows}, {inputs}], to which {_PACKED_END[1:]} "
            f"{list(words.shape)} with {group.bits} bits does not fit."
        )
    parts = {f"{module}{_PACKED_END}": words, f"{module}.weight_shape": shape}
    return _matrix(tensors, module, group, (rows, inputs), parts)


def _unpacked(tensors: Tensors, module: str, group: _Group) -> Matrix:
    values = require(tensors, f"{module}.weight", ("I8",), (None, None))
    return _matrix(tensors, module, group, (values.shape[0], values.shape[1]), {f"{module}.weight": values})


def _matrix(
    tensors: Tensors, module: str, group: _Group, shape: tuple[int, int], parts: dict[str, StoredTensor]
) -> Matrix:
    rows, inputs = shape
    groups = 1 if group.size is None else -(-inputs // group.size)
    scales = require(tensors, f"{module}{_SCALE_END}", FLOATS, (rows, groups))
    parts[f"{module}{_SCALE_END}"] = scales
    zeros = order = None
    if not group.is_symmetric:
        zeros = _zero_points(tensors, f"{module}.weight_zero_point", (rows, groups), group.bits)
        parts[f"{module}.weight_zero_point"] = zeros
    elif f"{module}.weight_zero_point" in tensors:  # zeros of symmetric schemes are 0
        parts[f"{module}.weight_zero_point"] = tensors[f"{module}.weight_zero_point"]
    if f"{module}.weight_g_idx" in tensors:
        index = require(tensors, f"{module}.weight_g_idx", ("I32", "I64"), (inputs,))
        parts[f"{module}.weight_g_idx"] = index
        order = _order(module, index, group.size, groups)
    form = _format(group, scale_of(scales))
    kind = _kind(group) + ("" if order is None else " in an order of its own")
    num_bytes = sum(part.end - part.start for part in parts.values())
    stored = StoredMatrix(kind, form if order is None else None, rows * inputs, num_bytes)
    values = next(iter(parts.values()))
    return Matrix(stored, tuple(parts), partial(_read, values, scales, zeros, group.bits, inputs, order))


def _zero_points(tensors: Tensors, name: str, shape: tuple[int, int], bits: int) -> StoredTensor:
    rows, groups = shape
    if name in tensors and tensors[name].dtype == "I32":
        return require(tensors, name, ("I32",), (-(-rows * bits // 32), groups))
    return require(tensors, name, ("I8",), shape)


def _order(module: str, index: StoredTensor, size: int | None, groups: int) -> Array | None:
    """Returns the group of each input, or None if the groups are neighbouring inputs. Old files have -1 for these."""
    found = read_array(index).astype(np.int64)
    if size is None or (found == -1).all() or np.array_equal(found, np.arange(len(found)) // size):
        return None
    if found.min() < 0 or found.max() >= groups:
        raise CheckpointError(f"{index.path}: tensor {module}.weight_g_idx has numbers beyond 0 to {groups - 1}.")
    return found


def _read(
    values: StoredTensor,
    scales: StoredTensor,
    zeros: StoredTensor | None,
    bits: int,
    inputs: int,
    order: Array | None,
) -> Numbers | Array:
    half = np.uint8(2 ** (bits - 1))
    # Integers plus `half`, from 0 to 15 or to 255. The sums of uint8 wrap around.
    if values.dtype == "I8":
        numbers = read_array(values).view(np.uint8) + half
    else:
        numbers = unpack_rows(read_array(values), bits, inputs)
    factors, points = read_array(scales), None
    if zeros is None:
        numbers = (numbers - half).view(np.int8)
    elif zeros.dtype == "I8":
        points = read_array(zeros).view(np.uint8) + half
    else:
        points = np.ascontiguousarray(unpack_columns(read_array(zeros), bits, scales.shape[0]).T)
    if order is not None:
        return dequantized(numbers, factors, points, order)
    return Numbers(numbers, factors, zeros=points)
