"""A third kind of `StateStore`, which shows that a new store needs no change of the cache manager and the scheduler.

States that are evicted from the slots go to host memory. They come back when a sequence continues from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.state_store import Pairs, Room, SlotStates
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.cache.unconfirmed import Unconfirmed
from jamba_server.engine.state_copies import SlotCopies
from jamba_server.kernels.ops import Kernels


class HostStates(SlotStates):
    """Places below `first` are slots. All other places are in host memory."""

    def __init__(self, num_slots: int, num_host: int) -> None:
        super().__init__(num_slots)
        self.first, self.host = num_slots, BlockPool(num_host)
        self._demotions: Pairs = []
        self._on_their_way = Unconfirmed()  # the keys of states that the next step copies to host memory

    @property
    def capacity(self) -> int:
        return self.slots.capacity + self.host.capacity

    @property
    def num_saved(self) -> int:
        return self.slots.num_cached + self.host.num_cached

    def find(self, key: bytes) -> int | None:
        if (slot := self.slots.lookup(key)) is not None:
            return slot
        return None if (unit := self.host.lookup(key)) is None else self.first + unit

    def was_evicted(self, key: bytes) -> bool:
        return self.find(key) is None and (self.slots.was_evicted(key) or self.host.was_evicted(key))

    def start(self, place: int | None) -> int | None:
        if place is None or place < self.first:
            slot = super().start(place)
        else:
            self.host.retain([place - self.first])
            if (slot := super().start(None)) is None:
                self.host.release([place - self.first])
            else:
                self._restores.append((place, slot))
        self._demote()
        return slot

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        room = super().reserve(key, slot=slot, evict=evict)
        if slot is None:
            self._demote()
        return room

    def _demote(self) -> None:
        """Plans copies to host memory for the states that were just evicted from their slots. The copies run before the
        next step, which writes to these slots."""
        for slot, key in self.slots.evicted:
            if self.host.lookup(key) is None and (units := self.host.allocate(1)) is not None:
                self._on_their_way.add(key, by_next=True)
                self.host.publish(units[0], key)
                self._demotions.append((slot, self.first + units[0]))
        self.slots.evicted = []

    def take_copies(self) -> tuple[Pairs, Pairs]:
        demotions, self._demotions = self._demotions, []
        return demotions, super().take_copies()[1]

    def launch(self, saves: Pairs, restores: Pairs) -> None:
        self._on_their_way.launch()
        self.host.release(place - self.first for _, place in saves)
        self.host.release(place - self.first for place, _ in restores if place >= self.first)
        super().launch(saves, [(place, slot) for place, slot in restores if place < self.first])

    def confirm(self) -> None:
        super().confirm()
        self._on_their_way.confirm()

    def discard(self) -> None:
        super().discard()
        self._demotions = []
        self.host.reset(self._on_their_way.discard())
        self._on_their_way.clear()


class HostCopies(SlotCopies):
    """Copies states between the slots and numpy arrays, which stand for host memory."""

    def __init__(self, storage: CacheStorage, kernels: Kernels, store: HostStates) -> None:
        super().__init__(storage, kernels)
        self._first, self._kept = store.first, dict[int, tuple[NDArray[np.uint8], ...]]()
        self._tensors = (storage.conv, storage.ssm)
        self.num_saved = self.num_restored = 0

    def _bytes(self, slot: int) -> list[NDArray[np.uint8]]:
        """Returns the bytes of the state in a slot, as views of the slot's tensors."""
        return [tensor[slot].view(-1).view(dtype=torch.uint8).numpy() for tensor in self._tensors]

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        for slot, place in pairs:
            self._kept[place] = tuple(array.copy() for array in self._bytes(slot))
            self.num_saved += 1

    def restore(self, pairs: Sequence[tuple[int, int]]) -> None:
        for place, slot in pairs:
            if place >= self._first:
                for array, kept in zip(self._bytes(slot), self._kept[place], strict=True):
                    array[:] = kept
                self.num_restored += 1
        if within := [(place, slot) for place, slot in pairs if place < self._first]:
            super().restore(within)
