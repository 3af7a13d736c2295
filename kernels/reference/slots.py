"""These ops write KV pages, and copy, compress and restore states between slots."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import CompressedStates

LEVELS = 127  # A compressed value is an integer from -LEVELS to LEVELS.
# If the largest magnitude of a channel is below this limit, the channel is stored as zeros. Otherwise LEVELS divided by
# that magnitude could overflow.
SMALLEST = 2.0**-100


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """See the protocol `kernels.ops.WriteKv` for the arguments and the effect."""
    block_size = k_pages.shape[1]
    page, offset = kv_slots // block_size, kv_slots % block_size
    k_pages[page, offset] = _stored(k, k_pages.dtype)
    v_pages[page, offset] = _stored(v, v_pages.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x converted to the pages' dtype: clamped to the range of `dtype` and rounded to the nearest number."""
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def copy_slots(tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
    """See the protocol `kernels.ops.CopySlots` for the arguments and the effect."""
    for tensor in tensors:
        tensor[destinations] = tensor[sources]


def compress_states(states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
    """See the protocol `kernels.ops.CompressStates` for the arguments and the effect."""
    x = states[sources]
    largest = x.abs().amax(-1)
    largest = torch.where(largest < SMALLEST, 0, largest)
    # The dividend is a tensor, because torch computes `LEVELS / largest` as LEVELS * (1 / largest), with two roundings.
    steps = torch.where(largest == 0, 0, torch.full_like(largest, LEVELS) / largest)
    compressed.values[destinations] = (x * steps[..., None]).round().to(torch.int8)
    compressed.scales[destinations] = largest * (1 / LEVELS)


def restore_states(compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """See the protocol `kernels.ops.RestoreStates` for the arguments and the effect."""
    states[destinations] = compressed.values[sources] * compressed.scales[sources][..., None]
