"""Reads folders that mlx-lm has converted: 4 or 8 bits, groups of 32, 64 or 128 inputs with a scale and a bias.

A module with K inputs and N outputs has weight, uint32 [N, K * bits / 32], whose lowest bits hold the first input, and
scales and biases [N, K / group size]. A weight is scale * number + bias. The experts of a layer are stacked in
`switch_mlp`, and the weight of a convolution is [channels, width, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, cast

import numpy as np

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.prequantized.arrays import FLOATS, read_array, scale_of, unpack_rows
from jamba_server.engine.prequantized.layout import Array, Layout, Matrix, Numbers, Plain, Tensors, require
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Format, Scale
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.weight_files import StoredTensor

_SCALES: Final = ".scales"
MARKS: Final = (_SCALES,)
_STACKED: Final = ".switch_mlp."
_CONVOLUTION: Final = ".conv1d.weight"
_SIZES: Final = (32, 64, 128)


def recognises(settings: Settings) -> bool:
    return "quant_method" not in settings.values and {"group_size", "bits"} <= settings.values.keys()


def layout(settings: Settings, tensors: Tensors) -> Layout:
    _bits_and_size(settings, "", settings.values)
    matrices: dict[str, Matrix] = {}
    plain: dict[str, Plain] = {}
    quantized = {name.removesuffix(_SCALES) for name in tensors if name.endswith(_SCALES)}
    for module in quantized:
        matrices |= _matrices(tensors, module, *_own(settings, module))
    for name, tensor in tensors.items():
        if name.endswith(_CONVOLUTION) and len(tensor.shape) == 3:
            plain[name] = Plain(name, partial(_convolution, tensor))
        elif name.endswith(".weight") and _STACKED in name and name.removesuffix(".weight") not in quantized:
            names = _names(name.removesuffix(".weight"), tensor)
            plain |= {own: Plain(name, partial(read_array, tensor, e)) for e, own in enumerate(names)}
    return Layout(matrices, plain)


def usual(settings: Settings, module: str) -> tuple[str, Format]:
    bits, size = _own(settings, module)
    return f"MLX of {bits} bits", _format(bits, size, "float32")


def _format(bits: int, size: int, scale: Scale) -> Format:
    return Format(bits=bits, limit=2**bits - 1, group_size=size, scale=scale, is_unsigned=True, has_offset=True)


def _own(settings: Settings, module: str) -> tuple[int, int]:
    """Returns the bits and the group size of a module, which may have settings of its own."""
    own = settings.values.get(module)
    if isinstance(own, dict):
        return _bits_and_size(settings, module, cast(dict[str, Any], own))
    return _bits_and_size(settings, "", settings.values)


def _bits_and_size(settings: Settings, module: str, values: Mapping[str, Any]) -> tuple[int, int]:
    prefix = f"{module}." if module else ""
    for key, allowed in (("bits", (4, 8)), ("group_size", _SIZES), ("mode", ("affine", None))):
        value = values.get(key)
        if not any(value == known and type(value) is type(known) for known in allowed):
            known = ", ".join(str(item) for item in allowed if item is not None)
            settings.refuse(f"{prefix}{key}", value, f"of MLX folders, this server reads {known} only")
    return values["bits"], values["group_size"]


def _names(module: str, tensor: StoredTensor) -> list[str]:
    """Returns the Hugging Face names of the weights in the tensor of a module, one for each expert."""
    if _STACKED not in module:
        return [f"{module}.weight"]
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{tensor.path}: tensor {module}.weight has shape {list(tensor.shape)}, not 3 sizes.")
    layer, _, projection = module.partition(_STACKED)
    return [f"{layer}.experts.{e}.{projection}.weight" for e in range(tensor.shape[0])]


def _matrices(tensors: Tensors, module: str, bits: int, size: int) -> dict[str, Matrix]:
    names = tuple(f"{module}.{end}" for end in ("weight", "scales", "biases"))
    dimensions = (None, None, None) if _STACKED in module else (None, None)
    words = require(tensors, names[0], ("U32",), dimensions)
    inputs = words.shape[-1] * 32 // bits
    shape = (*words.shape[:-1], -(-inputs // size))
    scales = require(tensors, names[1], FLOATS, shape)
    biases = require(tensors, names[2], (scales.dtype,), shape)
    if inputs % size:
        raise CheckpointError(f"{words.path}: tensor {names[0]} has {inputs} inputs, no multiple of {size}.")
    form = _format(bits, size, scale_of(scales))
    owners = _names(module, words)
    num_bytes = sum(tensor.end - tensor.start for tensor in (words, scales, biases)) // max(1, len(owners))
    stored = StoredMatrix(f"MLX of {bits} bits", form, words.shape[-2] * inputs, num_bytes)
    stacked = _STACKED in module
    return {
        owner: Matrix(stored, names, partial(_read, words, scales, biases, bits, e if stacked else None))
        for e, owner in enumerate(owners)
    }


def _read(words: StoredTensor, scales: StoredTensor, biases: StoredTensor, bits: int, index: int | None) -> Numbers:
    values = unpack_rows(read_array(words, index), bits, words.shape[-1] * 32 // bits)
    return Numbers(values, read_array(scales, index), offsets=read_array(biases, index))


def _convolution(tensor: StoredTensor) -> Array:
    """Returns the weight [D, W, 1] of a convolution as [D, 1, W]. A weight that has this shape already is returned as
    it is."""
    array = read_array(tensor)
    return np.ascontiguousarray(array.swapaxes(1, 2)) if tensor.shape[2] == 1 else array
