"""Writes into paged and slotted storage."""

from __future__ import annotations

from torch import Tensor


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """See `kernels.ops.WriteKv`."""
    block_size = k_pages.shape[1]
    page, offset = kv_slots // block_size, kv_slots % block_size
    k_pages[page, offset] = k
    v_pages[page, offset] = v


def copy_slots(tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.CopySlots`."""
    for tensor in tensors:
        tensor[destinations] = tensor[sources]
