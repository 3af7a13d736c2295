"""Reads tensors of safetensors files into numpy arrays, and unpacks integers of four or eight bits."""

from __future__ import annotations

from typing import Final

import numpy as np

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.prequantized.layout import Array
from jamba_server.engine.quantization import Scale
from jamba_server.engine.weight_files import StoredTensor

FLOATS: Final = ("BF16", "F16", "F32")
_DTYPES: Final = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U32": np.uint32,
}


def read_array(tensor: StoredTensor, index: int | None = None) -> Array:
    """Returns a tensor, or its part `index` along the first dimension. Numbers in bfloat16 become float32. Raises
    CheckpointError if the tensor's dtype is none of those that loaders read, or if the file is shorter than before."""
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{tensor.path}: a tensor of {list(tensor.shape)} has the dtype {tensor.dtype}.")
    shape = tensor.shape if index is None else tensor.shape[1:]
    size = tensor.end - tensor.start if index is None else (tensor.end - tensor.start) // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.start + (index or 0) * size)
        data = np.fromfile(file, np.uint8, size)
    if len(data) < size:
        raise CheckpointError(f"{tensor.path} became shorter while it was read.")
    array: Array = data.view(_DTYPES[tensor.dtype]).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else array


def unpack_rows(words: Array, bits: int, count: int) -> Array:
    """Returns the unsigned integers in the words [N, W], uint8 [N, count]. The lowest bits of a word hold the first
    integer."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[:, :count]
    pairs: Array = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=pairs[..., 0])
    np.right_shift(octets, 4, out=pairs[..., 1])
    return pairs.reshape(len(words), -1)[:, :count]


def unpack_columns(words: Array, bits: int, count: int) -> Array:
    """Returns the integers in words that each hold several rows of one column: words [W, N] become uint8 [N, count],
    the integers of column n in row n."""
    return unpack_rows(np.ascontiguousarray(words.T), bits, count)


def dequantized(values: Array, scales: Array, zeros: Array | None, groups: Array) -> Array:
    """Returns the float32 matrix [N, K] of integers [N, K] whose input k belongs to the group `groups[k]`."""
    numbers: Array = values.astype(np.float32)
    if zeros is not None:
        numbers -= zeros.astype(np.float32)[:, groups]
    numbers *= scales.astype(np.float32)[:, groups]
    return numbers


def scale_of(tensor: StoredTensor) -> Scale:
    """Returns how a format stores the scales in a tensor of the files."""
    return "float16" if tensor.dtype == "F16" else "float32"
