"""These kernels write keys and values to pages, and copy, compress and restore Mamba states between slots."""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import CompressedStates
from jamba_server.kernels.triton.launch import EXACT, INTERPRETED, cdiv, follow, jit, next_power_of_2

BLOCK = 4096  # The number of elements that a program of `copy_kernel` copies.
CHANNELS = 128  # The number of channels that a program compresses or restores.
LEVELS, SMALLEST = tl.constexpr(127.0), tl.constexpr(2.0**-100)
# Adding and then subtracting ROUND rounds a float32 number to an integer, ties to even.
ROUND = tl.constexpr(1.5 * 2.0**23)
FP8_LIMIT = tl.constexpr(448.0)  # The largest number in float8_e4m3fn.


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """Implements the protocol `WriteKv`, which is documented in the module `kernels.ops`."""
    rows, kv_heads, size = k.shape
    for name, part in (("k", k), ("v", v)):
        require(part.stride()[1:] == (size, 1), name, part, "have a row's heads side by side")
    dense = k_pages.stride()[1:] == (kv_heads * size, size, 1)
    require(dense, "k_pages", k_pages, "have a page's tokens side by side")
    require(v_pages.stride() == k_pages.stride(), "v_pages", v_pages, "have the strides of k_pages")
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
    """Implements the protocol `CopySlots`, which is documented in the module `kernels.ops`."""
    sources, destinations = sources.contiguous(), destinations.contiguous()
    for tensor in tensors:
        unit = tensor[0]
        require(unit.is_contiguous(), "one of tensors", tensor, "have units that are one piece of memory each")
        copy_kernel[(cdiv(unit.numel(), BLOCK), len(sources))](
            tensor, sources, destinations, unit.numel(), tensor.stride(0), BLOCK=BLOCK
        )


def compress_states(states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
    """Implements the protocol `CompressStates`, which is documented in the module `kernels.ops`."""
    _launch(compress_kernel, states, compressed, sources, destinations)


def restore_states(compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Implements the protocol `RestoreStates`, which is documented in the module `kernels.ops`."""
    _launch(restore_kernel, states, compressed, sources, destinations)


def _launch(kernel: Any, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
    values, scales = compressed
    for name, part in (("states", states), ("values", values), ("scales", scales)):
        require(part[0].is_contiguous(), name, part, "have units that are one piece of memory each")
    channels, size = scales[0].numel(), states.shape[-1]
    kernel[(cdiv(channels, CHANNELS), len(sources))](
        states,
        values,
        scales,
        sources.contiguous(),
        destinations.contiguous(),
        channels,
        states.stride(0),
        values.stride(0),
        scales.stride(0),
        SIZE=size,
        CHANNELS=CHANNELS,
        BLOCK=next_power_of_2(size),
        **EXACT,
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
    """Writes the keys and values of one token to the token's slot in the pages. The grid is (rows)."""
    follow()
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot = tl.load(kv_slots + row)
    place = slot // BLOCK_SIZE * page_stride + slot % BLOCK_SIZE * SIZE + i
    k_row, v_row = tl.load(k + row * k_stride + i, mask=i < SIZE), tl.load(v + row * v_stride + i, mask=i < SIZE)
    tl.store(k_pages + place, stored(k_row, k_pages.type.element_ty), mask=i < SIZE)
    tl.store(v_pages + place, stored(v_row, v_pages.type.element_ty), mask=i < SIZE)


@jit
def stored(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Converts x to `dtype`, the pages' dtype. For float8_e4m3fn, x is clamped to its range and rounded to nearest."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -FP8_LIMIT), FP8_LIMIT)
        if INTERPRETED:
            # When Triton's interpreter converts to float8, it rounds differently from a GPU. So x is rounded before the
            # conversion. If |x| is below 2**-6, x is rounded to a multiple of 2**-9. Otherwise the mantissa of x is
            # rounded to three bits.
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
    """Copies one block of a slot. The grid is (blocks of a slot, slots to copy)."""
    follow()
    pair, i = tl.program_id(1), tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, destination = tl.load(sources + pair) * slot_stride, tl.load(destinations + pair) * slot_stride
    tl.store(tensor + destination + i, tl.load(tensor + source + i, mask=i < size), mask=i < size)


@jit
def compress_kernel(
    states: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    sources: tl.tensor,
    destinations: tl.tensor,
    channels: tl.tensor,
    state_stride: tl.tensor,
    value_stride: tl.tensor,
    scale_stride: tl.tensor,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compresses the states of CHANNELS channels. The grid is (blocks of channels, slots to compress)."""
    follow()
    pair, channel = tl.program_id(1), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i, used = places(channel, channels, SIZE, BLOCK)
    source, destination = tl.load(sources + pair), tl.load(destinations + pair)
    x = tl.load(states + source * state_stride + i, mask=used, other=0.0)
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest < SMALLEST, 0.0, largest)
    steps = tl.where(largest == 0.0, 0.0, tl.div_rn(LEVELS, tl.where(largest == 0.0, 1.0, largest)))
    rounded = (x * steps[:, None] + ROUND) - ROUND
    tl.store(values + destination * value_stride + i, rounded.to(tl.int32).to(tl.int8), mask=used)
    tl.store(scales + destination * scale_stride + channel, largest * (1 / LEVELS), mask=channel < channels)


@jit
def restore_kernel(
    states: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    sources: tl.tensor,
    destinations: tl.tensor,
    channels: tl.tensor,
    state_stride: tl.tensor,
    value_stride: tl.tensor,
    scale_stride: tl.tensor,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Restores the states of CHANNELS channels. The grid is (blocks of channels, slots to restore)."""
    follow()
    pair, channel = tl.program_id(1), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i, used = places(channel, channels, SIZE, BLOCK)
    source, destination = tl.load(sources + pair), tl.load(destinations + pair)
    scale = tl.load(scales + source * scale_stride + channel, mask=channel < channels, other=0.0)
    x = tl.load(values + source * value_stride + i, mask=used, other=0).to(tl.float32) * scale[:, None]
    tl.store(states + destination * state_stride + i, x, mask=used)


@jit
def places(
    channel: tl.tensor, channels: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the offsets of each channel's numbers in a slot, and a mask of used offsets, each [CHANNELS, BLOCK]."""
    column = tl.arange(0, BLOCK)[None, :]
    return channel[:, None] * SIZE + column, (channel[:, None] < channels) & (column < SIZE)
