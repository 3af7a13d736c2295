"""The class `CacheStorage`: the tensors that hold the contents of all KV pages, state slots and compressed saved
states."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from jamba_server.engine.cache.layout import CacheLayout, Unit
from jamba_server.kernels.ops import CompressedStates


class CacheStorage:
    """KV pages and state slots of all layers, allocated once. Page 0 and slot 0 are dummies that no sequence owns. W
    stands for d_conv, D for d_inner and S for d_state.

    kv:   [pages, attention layers, 2, block_size, KV heads, head_dim]: the data of a page is contiguous
    conv: [slots, Mamba layers, W-1, D]: the last W-1 inputs of the convolution in each of D channels
    ssm:  [slots, Mamba layers, D, S]: the SSM states in float32
    If saved states are compressed, `num_compressed` is the number of compressed saved states plus one, for a dummy with
    id 0; otherwise `num_compressed` is 0. The SSM states of compressed saved states are in `compressed`. Their
    convolution states are in `conv`, uncompressed, after the convolution states of the slots.
    A layer's index counts the layers of its own kind: the third Mamba layer has index 2. A stage of a pipeline may have
    no layer of a kind. It then has pages, or slots, without content.
    """

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_pages: int,
        num_slots: int,
        num_compressed: int = 0,
        device: torch.device,
    ) -> None:
        def zeros(unit: Unit, name: str, count: int) -> Tensor:
            shape, dtype = layout.stacked(unit, name)
            return _zeros((count, *shape), getattr(torch, dtype), device)

        self.block_size, self.num_slots = layout.block_size, num_slots
        self.kv = zeros("page", "kv", num_pages)
        self.conv = zeros("slot", "conv", num_slots + num_compressed)
        self.ssm = zeros("slot", "ssm", num_slots)
        self.compressed: CompressedStates | None = None
        if num_compressed:
            values, scales = (zeros("saved", name, num_compressed) for name in ("values", "scales"))
            self.compressed = CompressedStates(values, scales)
        # These views of single layers are made once, because every step needs all of them. An attention layer has two
        # views, K pages and V pages, each [pages, block_size, KV heads, head_dim]. A Mamba layer has two views, the
        # convolution states [slots, W-1, D] and the SSM states [slots, D, S].
        self.kv_layers = [(self.kv[:, layer, 0], self.kv[:, layer, 1]) for layer in range(self.kv.shape[1])]
        self.state_layers = [(self.conv[:, layer], self.ssm[:, layer]) for layer in range(self.ssm.shape[1])]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of zeros. On a CPU the tensor is an anonymous memory mapping, whose parts take physical memory
    only once they are written. The mapping uses huge pages where the system has them: with small pages, most accesses
    to states in a step would miss the translation lookaside buffer (TLB)."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # an operating system without huge pages refuses the request for huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
