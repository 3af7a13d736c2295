"""Writes into paged and slotted storage."""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from kernels.triton.launch import INTERPRETED, cdiv, jit, next_power_of_2

BLOCK = 4096
FP8_LIMIT = tl.constexpr(448.0)  # the largest number of float8_e4m3fn


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """See `kernels.ops.WriteKv`."""
    rows, kv_heads, size = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (size, 1), "heads of a row lie side by side"
    assert k_pages.stride() == v_pages.stride() and k_pages.stride()[1:] == (kv_heads * size, size, 1)
    write_kernel[(rows,)](
        k,
        v,
        k_pages,
        v_pages,
        kv_slots,
        k.stride(0),
        v.stride(0),
        k_pages.stride(0),
        BLOCK_SIZE=k_pages.shape[1],
        SIZE=kv_heads * size,
        BLOCK=next_power_of_2(kv_heads * size),
    )


def copy_slots(tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.CopySlots`."""
    sources, destinations = sources.contiguous(), destinations.contiguous()
    for tensor in tensors:
        unit = tensor[0]
        assert unit.is_contiguous(), "a unit is one piece of memory"
        copy_kernel[(cdiv(unit.numel(), BLOCK), len(sources))](
            tensor, sources, destinations, unit.numel(), tensor.stride(0), BLOCK=BLOCK
        )


@jit
def write_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    kv_slots: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows)."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot = tl.load(kv_slots + row)
    place = slot // BLOCK_SIZE * page_stride + slot % BLOCK_SIZE * SIZE + i
    k_row, v_row = tl.load(k + row * k_stride + i, mask=i < SIZE), tl.load(v + row * v_stride + i, mask=i < SIZE)
    tl.store(k_pages + place, stored(k_row, k_pages.type.element_ty), mask=i < SIZE)
    tl.store(v_pages + place, stored(v_row, v_pages.type.element_ty), mask=i < SIZE)


@jit
def stored(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x as pages of `dtype` hold it: in float8_e4m3fn the nearest number, and the largest one for all beyond it."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -FP8_LIMIT), FP8_LIMIT)
        if INTERPRETED:  # it rounds otherwise: three digits, and multiples of 2**-9 below 2**-6
            bits = x.to(tl.int32, bitcast=True)
            digits = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < 2.0**-6, (x + 1.5 * 2.0**14) - 1.5 * 2.0**14, digits)
    return x.to(dtype)


@jit
def copy_kernel(
    tensor: tl.tensor,
    sources: tl.tensor,
    destinations: tl.tensor,
    size: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (blocks of a unit, pairs)."""
    pair, i = tl.program_id(1), tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, destination = tl.load(sources + pair) * slot_stride, tl.load(destinations + pair) * slot_stride
    tl.store(tensor + destination + i, tl.load(tensor + source + i, mask=i < size), mask=i < size)
