"""CacheStorage: the tensors behind page and slot ids."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from jamba_server.engine.cache.layout import CacheLayout, Unit
from jamba_server.kernels.ops import CompressedStates


class CacheStorage:
    """KV pages and state slots of all layers, allocated once. Id 0 of each is a dummy that no sequence owns.

    kv:   [pages, attention layers, 2, block_size, G, Z]: a page of all layers is one run of memory
    conv: [slots, Mamba layers, W-1, D]
    ssm:  [slots, Mamba layers, D, S]
    With `num_compressed` (the dummy included) saved states lie beside these: `compressed` has their SSM states
    compressed, and conv their convolutions', as they are, in units after those of the slots.
    Layers are counted among their own kind: the third Mamba layer is number 2.
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
        # Each layer's own, views made once, for every step needs all of them: K and V pages [pages, block_size, G, Z]
        # of an attention layer; states [slots, W-1, D] and [slots, D, S] of a Mamba layer.
        self.kv_layers = [(self.kv[:, layer, 0], self.kv[:, layer, 1]) for layer in range(self.kv.shape[1])]
        self.state_layers = [(self.conv[:, layer], self.ssm[:, layer]) for layer in range(self.ssm.shape[1])]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU in memory that takes room only once it is written and has huge pages, where the system has any: most
    of a step's accesses to states would miss the translation buffer otherwise."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
