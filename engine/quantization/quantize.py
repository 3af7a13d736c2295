"""Quantises a weight to one of the formats in `FORMATS`. Each weight is quantised once, while the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.config import Quantization
from jamba_server.engine.quantization import FORMATS, fp8, int4, int8
from jamba_server.kernels.cpu.quantize import QuantizeInt8
from jamba_server.kernels.ops import KernelUnavailable, QuantizedWeight

# A function that maps finite float32 numbers [rows, groups, inputs of a group] to quantised numbers of the same shape
# and to scales [rows, groups].
QuantizeGroups = Callable[[Tensor], tuple[Tensor, Tensor]]
# The same, with the largest magnitude of each row, as float32 [rows].
QuantizeRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
QUANTIZERS: Final[Mapping[Quantization, QuantizeGroups]] = {
    "int8": int8.quantize,
    "int4": int4.quantize,
    "int4-g32": int4.quantize_half,
    "fp8": fp8.quantize,
}
ROW_QUANTIZERS: Final[Mapping[Quantization, QuantizeRows]] = {"int8": int8.quantize_by, "fp8": fp8.quantize_by}
# The number of float32 numbers that are quantised at a time. On a CPU these numbers take 1 MiB, which fits into the
# CPU's caches. On a GPU these numbers take 64 MiB, which is enough to occupy the GPU fully.
_CHUNK: Final = {"cpu": 1 << 18, "cuda": 1 << 24}


def quantize(weight: Tensor, quantization: Quantization, largest: Tensor | None = None) -> QuantizedWeight:
    """Returns the weight [..., N, K], quantised to the format that `quantization` names. All numbers of the weight must
    be finite. The result is bit-identical for any number of threads.

    If the weight is a part of longer rows, each of which has one scale, `largest` has the largest magnitude of each row
    in the order of the rows, as float32."""
    if largest is not None:
        return _quantize_rows(weight, quantization, largest)
    inputs = weight.shape[-1]
    if quantization == "int8" and weight.is_cpu and weight.is_contiguous() and (compiled := _compiled_int8()):
        values, scales = compiled(weight.flatten(0, -2))
        return QuantizedWeight(values.view(weight.shape), scales.view(*weight.shape[:-1], 1), inputs, bits=8)
    group_size = FORMATS[quantization].group_size or inputs
    num_groups = -(-inputs // group_size)
    rows = weight.flatten(0, -2)
    dtype = torch.float8_e4m3fn if quantization == "fp8" else torch.int8
    values = torch.empty(rows.shape, dtype=dtype, device=weight.device)
    scale_dtype = torch.float16 if FORMATS[quantization].scale == "float16" else torch.float32
    scales = torch.empty(len(rows), num_groups, dtype=scale_dtype, device=weight.device)
    # A tensor on the device "meta" has no memory, so such a tensor is not cut into chunks.
    step = len(rows) if rows.is_meta else max(1, _CHUNK[rows.device.type] // inputs)
    for chunk, chunk_values, chunk_scales in zip(*(t.split(step) for t in (rows, values, scales)), strict=True):
        padded = torch.nn.functional.pad(chunk.float(), (0, num_groups * group_size - inputs))
        numbers, scale = QUANTIZERS[quantization](padded.unflatten(-1, (num_groups, group_size)))
        chunk_values.copy_(numbers.flatten(1)[:, :inputs])
        chunk_scales.copy_(scale)
    return QuantizedWeight(
        values.view(weight.shape), scales.view(*weight.shape[:-1], num_groups), group_size, FORMATS[quantization].bits
    )


def _quantize_rows(weight: Tensor, quantization: Quantization, largest: Tensor) -> QuantizedWeight:
    rows = weight.flatten(0, -2)
    dtype = torch.float8_e4m3fn if quantization == "fp8" else torch.int8
    values = torch.empty(rows.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(len(rows), device=weight.device)
    step = max(1, _CHUNK[rows.device.type] // weight.shape[-1])
    for chunk, own, chunk_values, chunk_scales in zip(
        *(t.split(step) for t in (rows, largest, values, scales)), strict=True
    ):
        numbers, scale = ROW_QUANTIZERS[quantization](chunk.float(), own)
        chunk_values.copy_(numbers)
        chunk_scales.copy_(scale)
    shape = (*weight.shape[:-1], 1)
    return QuantizedWeight(values.view(weight.shape), scales.view(shape), weight.shape[-1], FORMATS[quantization].bits)


@cache
def _compiled_int8() -> QuantizeInt8 | None:
    """Returns compiled code that quantises as the module `int8` does, or None if there is no compiled library."""
    try:
        return QuantizeInt8()
    except KernelUnavailable:
        return None
