"""Describes packed weights to the compiled library."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.library import INT, POINTER
from jamba_server.kernels.ops import SUPER_GROUP, QuantizedWeight

# The numbers of the C++ enumerations in `src/gemm.h`.
_KINDS: Final = {(torch.int8, 8): 1, (torch.uint8, 8): 2, (torch.int8, 4): 3, (torch.uint8, 4): 4}
_TABLE, _FP8 = 5, 6
_SCALES: Final = {torch.float32: 0, torch.float16: 1, torch.uint8: 2, torch.int8: 3}
_NO_SHIFT, _OFFSET, _ZERO = 0, 1, 2
# The kernels of four bits process 8 elements along K at once. The number of elements that share one scale must
# therefore be a multiple of 8, unless a whole row shares one scale.
_STEP: Final = 8
# The number that each pattern of four bits stands for.
_SIGNED: Final = (*range(8), *range(-8, 0))
_UNSIGNED: Final = tuple(range(16))


class Description(ctypes.Structure):
    """The address and the format of a packed weight, with the layout of the C++ struct `Weights` in `src/gemm.h`."""

    _fields_ = (
        ("panels", POINTER),
        ("n", INT),
        ("k", INT),
        ("kind", INT),
        ("group_size", INT),
        ("scale", INT),
        ("shift", INT),
        ("table", ctypes.c_float * 16),
        ("level", INT),
    )


def describe(weight: QuantizedWeight) -> Description:
    """Returns the description of a weight [..., N, K] that is not packed yet. Raises ValueError if the library has no
    code for the weight's format."""
    check(weight)
    values, signed = weight.values, weight.values.dtype == torch.int8
    kind = _FP8 if values.dtype == torch.float8_e4m3fn else _KINDS[values.dtype, weight.bits]
    table = weight.table or (_SIGNED if signed else _UNSIGNED)
    return Description(
        n=values.shape[-2],
        k=values.shape[-1],
        kind=_TABLE if weight.table else kind,
        group_size=weight.group_size,
        scale=_SCALES[weight.scales.dtype],
        shift=_NO_SHIFT if weight.offsets is weight.zeros is None else _ZERO if weight.offsets is None else _OFFSET,
        table=(ctypes.c_float * 16)(*table),
    )


def check(weight: QuantizedWeight) -> None:
    """Raises ValueError unless the library supports the bits, dtypes, shapes and group size of a quantised weight."""
    values, size, bits = weight.values, weight.group_size, weight.bits
    require(values.dim() in (2, 3) and values.is_cpu, "weight", values, "be [N, K] or [E, N, K] in the CPU's memory")
    if bits not in (4, 8):
        raise ValueError(f"the cpu kernels have products for weights of 4 and 8 bits, not {bits}")
    is_fp8 = values.dtype == torch.float8_e4m3fn and bits == 8
    if values.dtype not in (torch.int8, torch.uint8) and not is_fp8:
        raise ValueError(
            f"the cpu kernels read int8 and uint8 values, and float8_e4m3fn of 8 bits, not {values.dtype} of {bits}"
        )
    if size < 1 or (size < values.shape[-1] and size % _STEP):
        raise ValueError(f"the cpu kernels take groups of a multiple of {_STEP} inputs or of whole rows, not of {size}")
    _check_factors("scales", weight, weight.scales, weight.super_scales)
    _check_factors("offsets", weight, weight.offsets, weight.super_offsets)
    if weight.zeros is not None and (weight.offsets is not None or weight.table is not None or is_fp8):
        raise ValueError("a weight with zeros must have neither offsets nor a table nor float8 values")
    if weight.zeros is not None and (weight.zeros.dtype != torch.uint8 or weight.zeros.shape != weight.scales.shape):
        raise ValueError(f"zeros must be uint8 in the shape of the scales, not {weight.zeros.dtype}")
    if weight.table is not None and (bits != 4 or values.dtype != torch.uint8 or len(weight.table) != len(_UNSIGNED)):
        raise ValueError("a table must have 16 numbers, for uint8 values of 4 bits")
    if weight.offsets is not None and weight.offsets.dtype != weight.scales.dtype:
        raise ValueError(f"offsets must have the scales' dtype {weight.scales.dtype}, not {weight.offsets.dtype}")


def _check_factors(name: str, weight: QuantizedWeight, factors: Tensor | None, supers: Tensor | None) -> None:
    if factors is None:
        return
    values, size = weight.values, weight.group_size
    dtypes = (torch.float32, torch.float16) if supers is None else (torch.uint8, torch.int8)
    expected = (*values.shape[:-1], -(-values.shape[-1] // size))
    if tuple(factors.shape) != expected or factors.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"quantised values {tuple(values.shape)} in groups of {size} have {names} {name} {expected}, "
            f"not {factors.dtype} {tuple(factors.shape)}"
        )
    if supers is None:
        return
    shape = (*values.shape[:-1], -(-values.shape[-1] // SUPER_GROUP))
    if tuple(supers.shape) != shape or supers.dtype != torch.float16 or SUPER_GROUP % size:
        raise ValueError(
            f"the second level of {name} must be float16 {shape} for groups of a divisor of {SUPER_GROUP} inputs, not "
            f"{supers.dtype} {tuple(supers.shape)} for groups of {size}"
        )
