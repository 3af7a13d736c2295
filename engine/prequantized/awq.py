"""Reads folders of AutoAWQ in its layout "gemm": 4 bits, groups with zero points.

A module with K inputs and N outputs has qweight, int32 [K, N / 8], scales [G, N], and qzeros, int32 [G, N / 8]. A word
holds eight consecutive outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, beginning with the lowest four bits.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from jamba_server.engine.prequantized.arrays import FLOATS, read_array, scale_of, unpack_rows
from jamba_server.engine.prequantized.layout import Array, Layout, Matrix, Numbers, Tensors, require
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Format, Scale
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.weight_files import StoredTensor

_METHODS: Final = ("awq", "autoawq", "quant_config.json")
_END: Final = ".qweight"
MARKS: Final = (_END,)
_KIND: Final = "AWQ of 4 bits"
# The place in a word of each of its eight outputs.
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


def recognises(settings: Settings) -> bool:
    return settings.method in _METHODS


def layout(settings: Settings, tensors: Tensors) -> Layout:
    settings.one_of("w_bit" if "w_bit" in settings.values else "bits", 4)
    size = _group_size(settings)
    for key in ("version", "format", "checkpoint_format"):
        settings.one_of(key, "gemm", "GEMM", None)
    settings.one_of("zero_point", True, None)
    modules = [name.removesuffix(_END) for name in tensors if name.endswith(_END)]
    return Layout({f"{module}.weight": _matrix(tensors, module, size) for module in modules})


def usual(settings: Settings, module: str) -> tuple[str, Format]:
    return _KIND, _format(_group_size(settings), "float16")


def _group_size(settings: Settings) -> int | None:
    return settings.group_size("q_group_size" if "w_bit" in settings.values else "group_size")


def _format(size: int | None, scale: Scale) -> Format:
    return Format(bits=4, limit=15, group_size=size, scale=scale, is_unsigned=True, has_zero=True)


def _matrix(tensors: Tensors, module: str, size: int | None) -> Matrix:
    words = require(tensors, f"{module}{_END}", ("I32",), (None, None))
    inputs, outputs = words.shape[0], words.shape[1] * 8
    groups = 1 if size is None else -(-inputs // size)
    scales = require(tensors, f"{module}.scales", FLOATS, (groups, outputs))
    zeros = require(tensors, f"{module}.qzeros", ("I32",), (groups, words.shape[1]))
    form = _format(size, scale_of(scales))
    num_bytes = sum(tensor.end - tensor.start for tensor in (words, scales, zeros))
    names = tuple(f"{module}.{end}" for end in ("qweight", "scales", "qzeros"))
    stored = StoredMatrix(_KIND, form, inputs * outputs, num_bytes)
    return Matrix(stored, names, partial(_read, words, scales, zeros))


def _read(words: StoredTensor, scales: StoredTensor, zeros: StoredTensor) -> Numbers:
    factors = np.ascontiguousarray(read_array(scales).T)
    return Numbers(_unpacked(words), factors, zeros=_unpacked(zeros))


def _unpacked(words: StoredTensor) -> Array:
    """Returns the integers in words [K, N / 8] as uint8 [N, K]."""
    stored = unpack_rows(read_array(words), 4, words.shape[1] * 8)
    ordered = stored.reshape(len(stored), -1, 8)[..., _PLACES]
    return np.ascontiguousarray(ordered.reshape(stored.shape).T)
