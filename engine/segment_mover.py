"""DeviceMover: copies pages and states between the device and the segments of the prefix cache's tiers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.cache.tiers.segment import Segment


class DeviceMover:
    """Implements `cache.tiers.cache.Mover` for the tensors of a `CacheStorage`. The device runs the copies in the order
    of the calls, between the steps that were launched before and those that are launched later."""

    def __init__(self, storage: CacheStorage) -> None:
        self._storage = storage
        self._state = {"conv": storage.conv, "ssm": storage.ssm}

    def read(self, pages: Sequence[int], used: int, place: int) -> Mapping[str, memoryview]:
        kv = _rows(self._storage.kv, pages)
        # The rest of the last page may have keys and values of another text, which must not be written to a file.
        kv[-1, :, :, used - (len(pages) - 1) * self._storage.block_size :] = 0
        states = {name: _rows(tensor, [place]) for name, tensor in self._state.items()}
        return {name: array.reshape(-1).data for name, array in {"kv": kv, **states}.items()}

    def write(self, contents: Sequence[tuple[Segment, Sequence[tuple[int, int]]]], slot: int | None) -> float:
        began = time.monotonic()
        kv = self._storage.kv
        for segment, pairs in contents:
            if pairs:
                there = _tensor(segment.tensors["kv"], kv.dtype).view(-1, *kv.shape[1:])
                sources, destinations = torch.tensor(pairs).unbind(1)
                kv[destinations.to(kv.device)] = there[sources].to(kv.device)
        if slot is not None:
            for name, tensor in self._state.items():
                tensor[slot].copy_(_tensor(contents[-1][0].tensors[name], tensor.dtype).view(tensor.shape[1:]))
        return time.monotonic() - began


def _rows(tensor: Tensor, rows: Sequence[int]) -> NDArray[np.uint8]:
    """Returns a copy on the host of some rows of a contiguous tensor [number, ...], as bytes [len(rows), ...].

    numpy copies with the calling thread alone. torch would share the work among its threads, and would wait until a
    core is free for each of them, which takes longer than the copy of so few bytes."""
    if tensor.device.type != "cpu":
        return tensor[torch.tensor(rows, device=tensor.device)].view(torch.uint8).cpu().numpy()
    return tensor.view(torch.uint8).numpy()[np.array(rows, dtype=np.int64)]


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype)
