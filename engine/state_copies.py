"""StateCopies: copies Mamba states between the state slots of running sequences and the places where a `StateStore`
keeps saved states. The device runs the copies and the other kernels of a step in the order of their launch."""

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
    """Copies Mamba states between slots (of running sequences) and places (in the store of saved states). The callers
    guarantee for each list of pairs that all destinations are distinct and that no destination is also a source. So the
    copies of one list may run in any order."""

    def save(self, pairs: Pairs) -> None:
        """Launches copies of states from the slots of sequences to places in the store. Each of `pairs` is (slot,
        place)."""
        ...

    def restore(self, pairs: Pairs) -> None:
        """Launches copies of saved states to the slots of sequences that continue from these states. Each of `pairs` is
        (place, slot)."""
        ...


class SlotCopies:
    """The copies for the store `SlotStates`, which keeps saved states in state slots: every place is the id of a state
    slot."""

    def __init__(self, storage: CacheStorage, kernels: Kernels) -> None:
        self._storage, self._kernels = storage, kernels

    def save(self, pairs: Pairs) -> None:
        """Copies nothing, because the store `SlotStates` keeps a saved state in the slot into which a kernel wrote this
        state. The method exists because the class `Rehearsal` calls `save` for every kind of store."""

    def restore(self, pairs: Pairs) -> None:
        tensors = (self._storage.conv, self._storage.ssm)
        self._kernels.copy_slots(tensors, *columns(pairs, self._storage.kv.device))


class NoCopies:
    """Copies nothing: the states of a stage without Mamba layers have no content."""

    def save(self, pairs: Pairs) -> None:
        """See `StateCopies.save`."""

    def restore(self, pairs: Pairs) -> None:
        """See `StateCopies.restore`."""


class CompressedCopies:
    """The copies for the store `CompressedStates`. SSM states are compressed. Convolution states are copied
    uncompressed within the storage's tensor `conv`: the first `num_slots` entries of this tensor are the state slots,
    and the following entries are the places of saved states."""

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
    """Returns the object that copies states for the kind of store that `storage` was allocated for."""
    if not storage.state_layers:
        return NoCopies()
    if storage.compressed is None:
        return SlotCopies(storage, kernels)
    return CompressedCopies(storage, storage.compressed, kernels)


def columns(pairs: Pairs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns two int64 tensors [len(pairs)] on the device: the sources of all pairs and the destinations of all
    pairs."""
    [both] = upload([np.array(pairs, dtype=np.int64).T.copy()], device)
    return both[0], both[1]
