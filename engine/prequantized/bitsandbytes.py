"""Reads folders that transformers has saved from a model in 8 or 4 bits of bitsandbytes.

In 8 bits, a module has weight, int8 [N, K], and SCB, float32 [N], which is 127 times the scale of each row.

In 4 bits, weight is uint8 [ceil(N * K / 2), 1] and has two numbers in a byte, the first in the higher bits. The numbers
select entries of a table. Blocks of consecutive numbers of the flattened matrix share a scale, which is in absmax,
float32 [blocks], or, if nested, in uint8 [blocks], whose blocks have scales and a table of their own. A JSON object in
weight.quant_state has the shape of the matrix and the sizes of the blocks.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, Final, NamedTuple, cast

import numpy as np

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.prequantized.arrays import read_array
from jamba_server.engine.prequantized.layout import Array, Layout, Matrix, Numbers, Tensors, require
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.weight_files import StoredTensor

_ROW_SCALES: Final = ".SCB"
MARKS: Final = (_ROW_SCALES, ".weight.absmax")
_STATE: Final = ".weight.quant_state.bitsandbytes__"
_MAX_STATE: Final = 1 << 16  # the JSON object with the state of a matrix has about 200 bytes
_TABLES: Final = ("nf4", "fp4")


class _State(NamedTuple):
    """The state of a matrix: its shape, and the number of numbers that share a scale. `nested` has the number of scales
    that share a scale of their own, and the offset of the scales, or it is None."""

    shape: tuple[int, int]
    block: int
    nested: tuple[int, float] | None


def recognises(settings: Settings) -> bool:
    old = settings.method is None and (settings.values.get("load_in_4bit") or settings.values.get("load_in_8bit"))
    return settings.method == "bitsandbytes" or bool(old)


def layout(settings: Settings, tensors: Tensors) -> Layout:
    settings.one_of("bnb_4bit_quant_type", *_TABLES, None)
    matrices: dict[str, Matrix] = {}
    unused: set[str] = set()
    for name in tensors:
        if name.endswith(_ROW_SCALES):
            module = name.removesuffix(_ROW_SCALES)
            matrices[f"{module}.weight"] = _of_rows(tensors, module)
            unused |= {f"{module}.weight_format"} & tensors.keys()
        elif _STATE in name:
            module, _, kind = name.partition(_STATE)
            matrices[f"{module}.weight"] = _of_blocks(tensors, module, name, kind)
    notes = ("the method's rounding of activations to 8 bits is not followed: activations keep the model's dtype",)
    return Layout(matrices, unused=frozenset(unused), notes=notes if settings.values.get("load_in_8bit") else ())


def usual(settings: Settings, module: str) -> tuple[str, Format]:
    if settings.values.get("load_in_8bit"):
        return "int8 of bitsandbytes", Format(bits=8, limit=127, group_size=None)
    kind = str(settings.values.get("bnb_4bit_quant_type") or "fp4").upper()  # the package's defaults
    return f"{kind} of bitsandbytes", Format(bits=4, limit=1, group_size=64, is_unsigned=True)


def _of_rows(tensors: Tensors, module: str) -> Matrix:
    values = require(tensors, f"{module}.weight", ("I8",), (None, None))
    scales = require(tensors, f"{module}{_ROW_SCALES}", ("F32",), (values.shape[0],))
    form = Format(bits=8, limit=127, group_size=None)
    num_bytes = values.end - values.start + scales.end - scales.start
    stored = StoredMatrix("int8 of bitsandbytes", form, values.shape[0] * values.shape[1], num_bytes)
    return Matrix(stored, (f"{module}.weight", f"{module}{_ROW_SCALES}"), partial(_read_rows, values, scales))


def _read_rows(values: StoredTensor, scales: StoredTensor) -> Numbers:
    return Numbers(read_array(values), read_array(scales)[:, None] / np.float32(127))


def _of_blocks(tensors: Tensors, module: str, state_name: str, kind: str) -> Matrix:
    if kind not in _TABLES:
        raise CheckpointError(
            f"{tensors[state_name].path}: tensor {state_name} is of type {shown(kind)}; this server reads "
            f"{' and '.join(_TABLES)} of bitsandbytes."
        )
    state = _read_state(state_name, require(tensors, state_name, ("U8",), (None,)))
    rows, inputs = state.shape
    prefix, blocks = f"{module}.weight", -(-rows * inputs // state.block)
    parts = {prefix: require(tensors, prefix, ("U8",), (-(-rows * inputs // 2), 1))}
    parts["absmax"] = require(tensors, f"{prefix}.absmax", ("F32",) if state.nested is None else ("U8",), (blocks,))
    parts["quant_map"] = require(tensors, f"{prefix}.quant_map", ("F32",), (16,))
    if state.nested is not None:
        upper = -(-blocks // state.nested[0])
        parts["nested_absmax"] = require(tensors, f"{prefix}.nested_absmax", ("F32",), (upper,))
        parts["nested_quant_map"] = require(tensors, f"{prefix}.nested_quant_map", ("F32",), (256,))
    form = None
    if inputs % state.block == 0:  # a block is within a row
        table = tuple(float(number) for number in read_array(parts["quant_map"]))
        if not all(map(math.isfinite, table)):
            raise CheckpointError(f"{parts['quant_map'].path}: tensor {prefix}.quant_map has infinite numbers or NaN.")
        form = Format(bits=4, limit=1, group_size=state.block, is_unsigned=True, table=table)
    names = (state_name, *(name if name == prefix else f"{prefix}.{name}" for name in parts))
    num_bytes = sum(part.end - part.start for part in parts.values())
    values = parts.pop(prefix)
    stored = StoredMatrix(f"{kind.upper()} of bitsandbytes", form, rows * inputs, num_bytes)
    return Matrix(stored, names, partial(_read_blocks, values, parts, state))


def _read_state(name: str, tensor: StoredTensor) -> _State:
    """Reads the JSON object with the state of a matrix. Raises CheckpointError if a value is missing or impossible."""
    found: dict[str, Any] = {}
    if tensor.end - tensor.start <= _MAX_STATE:
        try:
            values: object = json.loads(read_array(tensor).tobytes())
        except (ValueError, RecursionError):
            values = None
        found = cast(dict[str, Any], values) if isinstance(values, dict) else {}
    shape, block = found.get("shape"), found.get("blocksize")
    sizes = cast(list[object], shape) if isinstance(shape, list) else []
    nested = (found.get("nested_blocksize"), found.get("nested_offset")) if "nested_blocksize" in found else None
    numbers = [*sizes, block, *([nested[0]] if nested else [])]
    whole = all(isinstance(number, int) and 0 < number < 1 << 31 for number in numbers)
    if len(sizes) != 2 or not whole or (nested and not isinstance(nested[1], float | int)):
        raise CheckpointError(f"{tensor.path}: tensor {name} holds no valid state of a matrix of bitsandbytes.")
    return _State(cast(tuple[int, int], tuple(sizes)), cast(int, block), cast("tuple[int, float] | None", nested))


def _read_blocks(values: StoredTensor, parts: dict[str, StoredTensor], state: _State) -> Numbers | Array:
    rows, inputs = state.shape
    octets = read_array(values).reshape(-1)
    numbers = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[: rows * inputs]
    scales = read_array(parts["absmax"])
    if state.nested is not None:
        size, offset = state.nested
        upper = np.repeat(read_array(parts["nested_absmax"]), min(size, len(scales)))[: len(scales)]
        scales = read_array(parts["nested_quant_map"])[scales] * upper + np.float32(offset)
    if inputs % state.block == 0:
        return Numbers(numbers.reshape(rows, inputs), scales.reshape(rows, -1))
    spread = np.repeat(scales, min(state.block, len(numbers)))[: len(numbers)]
    return (read_array(parts["quant_map"])[numbers] * spread).reshape(rows, inputs)
