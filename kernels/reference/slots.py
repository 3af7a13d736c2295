"""Writes into paged and slotted storage."""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
    """See `kernels.ops.WriteKv`."""
    block_size = k_pages.shape[1]
    page, offset = kv_slots // block_size, kv_slots % block_size
    k_pages[page, offset] = _stored(k, k_pages.dtype)
    v_pages[page, offset] = _stored(v, v_pages.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as pages of `dtype` hold it: in a narrower one the nearest number, and the largest one for all beyond it."""
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def copy_slots(tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
    """See `kernels.ops.CopySlots`."""
    for tensor in tensors:
        tensor[destinations] = tensor[sources]
