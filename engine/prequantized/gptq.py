"""Reads folders of AutoGPTQ, GPTQModel and optimum: 4 or 8 bits, groups with zero points.

A module with K inputs and N outputs has qweight, int32 [K * bits / 32, N], whose words hold consecutive inputs; scales
[G, N]; and qzeros, int32 [G, N * bits / 32], whose words hold consecutive outputs. The stored zeros are one less than
the true ones unless the format is gptq_v2. If g_idx, int32 [K], is there, it has the group of each input. Some modules
may have other bits and groups than the settings say (`dynamic` of GPTQModel), so both follow from the shapes.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from jamba_server.engine.errors import CheckpointError
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
from jamba_server.engine.weight_files import StoredTensor

_METHODS: Final = ("gptq", "auto_gptq", "gptqmodel", "quantize_config.json")
_END: Final = ".qweight"
MARKS: Final = (_END,)


def recognises(settings: Settings) -> bool:
    return settings.method in _METHODS


def layout(settings: Settings, tensors: Tensors) -> Layout:
    settings.one_of("bits", 4, 8)
    size = settings.group_size("group_size")
    formats = [settings.one_of(key, "gptq", "gptq_v2", None) for key in ("checkpoint_format", "format")]
    settings.one_of("pack_dtype", "int32", None)
    settings.one_of("is_marlin_format", False, None)
    less = 0 if "gptq_v2" in formats else 1
    matrices: dict[str, Matrix] = {}
    unused: set[str] = set()
    for name in tensors:
        if name.endswith(_END):
            module = name.removesuffix(_END)
            matrices[f"{module}.weight"] = _matrix(tensors, module, size, less)
            # Old tools wrote a bias of zeros for modules that have none.
            if (bias := f"{module}.bias") in tensors and not read_array(tensors[bias]).any():
                unused |= set() if module.endswith(".dt_proj") else {bias}
    return Layout(matrices, unused=frozenset(unused))


def usual(settings: Settings, module: str) -> tuple[str, Format]:
    bits = settings.values["bits"]
    return f"GPTQ of {bits} bits", _format(bits, settings.group_size("group_size"), "float16")


def _format(bits: int, size: int | None, scale: Scale) -> Format:
    return Format(bits=bits, limit=2**bits - 1, group_size=size, scale=scale, is_unsigned=True, has_zero=True)


def _matrix(tensors: Tensors, module: str, size: int | None, less: int) -> Matrix:
    words = require(tensors, f"{module}{_END}", ("I32",), (None, None))
    outputs = words.shape[1]
    scales = require(tensors, f"{module}.scales", FLOATS, (None, outputs))
    groups = scales.shape[0]
    zeros = require(tensors, f"{module}.qzeros", ("I32",), (groups, None))
    bits = 32 * zeros.shape[1] // outputs if outputs else 0
    inputs = words.shape[0] * 32 // bits if bits in (4, 8) else 0
    if size is None or -(-inputs // size) != groups:
        size = None if groups == 1 else inputs // groups
    if not inputs or (size is not None and (size < 8 or size % 8 or -(-inputs // size) != groups)):
        raise CheckpointError(
            f"{words.path}: tensor {module}{_END} {list(words.shape)} with scales {list(scales.shape)} and zeros "
            f"{list(zeros.shape)} is not of 4 or 8 bits in groups of a multiple of 8 inputs, which this server reads."
        )
    names = [f"{module}.{end}" for end in ("qweight", "scales", "qzeros")]
    order = None
    if f"{module}.g_idx" in tensors:
        names.append(f"{module}.g_idx")
        order = _order(names[-1], require(tensors, names[-1], ("I32", "I64"), (inputs,)), size, groups)
    form = _format(bits, size, scale_of(scales))
    kind = f"GPTQ of {bits} bits" + (" with desc_act" if order is not None else "")
    num_bytes = sum(tensors[name].end - tensors[name].start for name in names)
    stored = StoredMatrix(kind, None if order is not None else form, inputs * outputs, num_bytes)
    return Matrix(stored, tuple(names), partial(_read, words, scales, zeros, bits, less, order))


def _order(name: str, tensor: StoredTensor, size: int | None, groups: int) -> Array | None:
    """Returns the group of each input, or None if the groups are neighbouring inputs."""
    found = read_array(tensor).astype(np.int64)
    if found.size and not (found.min() >= 0 and found.max() < groups):
        raise CheckpointError(f"{tensor.path}: tensor {name} has numbers beyond 0 to {groups - 1}.")
    return None if size is None or np.array_equal(found, np.arange(len(found)) // size) else found


def _read(
    words: StoredTensor, scales: StoredTensor, zeros: StoredTensor, bits: int, less: int, order: Array | None
) -> Numbers | Array:
    values = unpack_columns(read_array(words), bits, words.shape[0] * 32 // bits)
    # GPTQModel subtracts one from all numbers of a word at once, so a zero of 0 borrows from the next number. The same
    # sum of whole words restores the numbers.
    ones = sum(less << shift for shift in range(0, 32, bits))
    points = unpack_rows(read_array(zeros).view(np.uint32) + np.uint32(ones), bits, words.shape[1])
    factors = np.ascontiguousarray(read_array(scales).T)
    if order is not None:
        return dequantized(values, factors, points.T, order)
    return Numbers(values, factors, zeros=np.ascontiguousarray(points.T))
