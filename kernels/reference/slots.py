"""These ops write KV pages, and copy, compress and restore states between slots."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import CompressedStates

LEVELS = 127  # A compressed value is an integer from -LEVELS to LEVELS.
# A channel whose numbers all have magnitudes below 2**-100 is stored as zeros, so that 127 / magnitude cannot overflow.
SMALLEST = 2.0**-100


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """See `kernels.ops.WriteKv`."""
    block_size = k_pages.shape[1]
    page, offset = kv_slots // block_size, kv_slots % block_size
    k_pages[page, offset] = _stored(k, k_pages.dtype)
    v_pages[page, offset] = _stored(v, v_pages.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x as pages of `dtype` store it: clamped to the range of `dtype` and rounded to the nearest number."""
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def copy_slots(tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.CopySlots`."""
    for tensor in tensors:
        tensor[destinations] = tensor[sources]


def compress_states(states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.CompressStates`."""
    x = states[sources]
    largest = x.abs().amax(-1)
    largest = torch.where(largest < SMALLEST, 0, largest)
    steps = torch.where(
        largest == 0, 0, torch.full_like(largest, LEVELS) / largest
    )  # For the integer LEVELS, torch would multiply LEVELS by the rounded reciprocal of `largest`.
    compressed.values[destinations] = (x * steps[..., None]).round().to(torch.int8)
    compressed.scales[destinations] = largest * (1 / LEVELS)


def restore_states(compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.RestoreStates`."""
    states[destinations] = compressed.values[sources] * compressed.scales[sources][..., None]
