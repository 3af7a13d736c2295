"""StateCopies: states on their way between the slots and the places of a `StateStore`, in a step's own order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.staging import upload
from jamba_server.kernels.ops import CompressedStates, Kernels

Pairs = Sequence[tuple[int, int]]


class StateCopies(Protocol):
    """What a `StateStore` asks for, done. In both, destinations are distinct and none is a source."""

    def save(self, pairs: Pairs) -> None:
        """(slot, place): launches copies of states to where they stay."""
        ...

    def restore(self, pairs: Pairs) -> None:
        """(place, slot): launches copies of saved states to where sequences go on from them."""
        ...


class SlotCopies:
    """For `SlotStates`: a place is a slot."""

    def __init__(self, storage: CacheStorage, kernels: Kernels) -> None:
        self._storage, self._kernels = storage, kernels

    def save(self, pairs: Pairs) -> None:
        """Nothing: a state is where it stays. Rehearsed steps ask for it, whatever the store."""

    def restore(self, pairs: Pairs) -> None:
        tensors = (self._storage.conv, self._storage.ssm)
        self._kernels.copy_slots(tensors, *columns(pairs, self._storage.kv.device))


class CompressedCopies:
    """For `CompressedStates`: SSM states are compressed, convolutions are copied to units behind those of the slots."""

    def __init__(self, storage: CacheStorage, compressed: CompressedStates, kernels: Kernels) -> None:
        self._storage, self._compressed, self._kernels = storage, compressed, kernels

    def save(self, pairs: Pairs) -> None:
        storage, device = self._storage, self._storage.kv.device
        self._kernels.compress_states(storage.ssm, self._compressed, *columns(pairs, device))
        convolutions = [(slot, storage.num_slots + place) for slot, place in pairs]
        self._kernels.copy_slots((storage.conv,), *columns(convolutions, device))

    def restore(self, pairs: Pairs) -> None:
        storage, device = self._storage, self._storage.kv.device
        self._kernels.restore_states(self._compressed, storage.ssm, *columns(pairs, device))
        convolutions = [(storage.num_slots + place, slot) for place, slot in pairs]
        self._kernels.copy_slots((storage.conv,), *columns(convolutions, device))


def state_copies(storage: CacheStorage, kernels: Kernels) -> StateCopies:
    """Those of the store that this storage was made for."""
    if storage.compressed is None:
        return SlotCopies(storage, kernels)
    return CompressedCopies(storage, storage.compressed, kernels)


def columns(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources and destinations, int64 [pairs] each, on the device."""
    [both] = upload([np.array(pairs, dtype=np.int64).T.copy()], device)
    return both[0], both[1]
