"""StateStore: where saved states lie, and the copies that bring them there and back. Bookkeeping only.

Two kinds are served: `SlotStates` leaves a state in the slot that it was written to, `CompressedStates` copies it to a
pool of its own. States in host memory or on a disk are further kinds: each decides by itself where a state stays, and
asks for what has to be copied before the next step (`engine.state_copies` has the memory behind a store).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.unconfirmed import Unconfirmed

Pairs = list[tuple[int, int]]


class Room(NamedTuple):
    """A state is written to `slot`, and stays at `place`."""

    slot: int
    place: int


class StateStore(Protocol):
    """Saved states, each findable by the key of the prefix that it follows. A *place* is where one lies, a number that
    only the store understands. Every slot is handed out here, so that a store learns what is evicted for it."""

    slots: BlockPool  # of sequences that run, and of states on their way

    @property
    def capacity(self) -> int:
        """How many states there can be."""
        ...

    @property
    def num_saved(self) -> int:
        """How many states can be found."""
        ...

    def find(self, key: bytes) -> int | None:
        """The place of the state saved under `key`. Changes nothing."""
        ...

    def was_evicted(self, key: bytes) -> bool:
        """Whether there was one lately, which is lost."""
        ...

    def start(self, place: int | None) -> int | None:
        """A slot for a sequence, to which the next step first copies the state at `place`; None, and nothing happens,
        if no slot is free."""
        ...

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        """Room for a state that is in `slot`, or that the next step will write to a slot of the store's choice. None if
        there is no room, or if the state is there already. Without `evict`, saved states stay."""
        ...

    def save(self, key: bytes, room: Room, *, worth: float) -> bool:
        """Makes a state findable that has been written, or that the last step launched writes. False if another one has
        that key already; then its place is free again. The slot remains the caller's to release."""
        ...

    def take_copies(self) -> tuple[Pairs, Pairs]:
        """What must be copied before the next step: (slot, place) pairs to save, and after these (place, slot) pairs to
        restore. What they name is held until `launch`."""
        ...

    def launch(self, saves: Pairs, restores: Pairs) -> None:
        """The step has been launched, with these copies."""
        ...

    def confirm(self) -> None:
        """The oldest step that was not confirmed is now."""
        ...

    def discard(self) -> None:
        """A step has failed: takes all slots back, and forgets what has not been confirmed."""
        ...


class SlotStates:
    """Saved states in the slots that sequences run in: what is saved stays where it is, and only a hit copies."""

    def __init__(self, num_slots: int) -> None:
        self.slots = BlockPool(num_slots)
        self._restores: Pairs = []
        self._unconfirmed = Unconfirmed()

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    @property
    def num_saved(self) -> int:
        return self.slots.num_cached

    def find(self, key: bytes) -> int | None:
        return self.slots.lookup(key)

    def was_evicted(self, key: bytes) -> bool:
        return self.slots.was_evicted(key)

    def start(self, place: int | None) -> int | None:
        if place is None:
            return _one(self.slots.allocate(1))
        if 1 + (self.slots.refs[place] == 0) > self.slots.num_free:
            return None
        self.slots.retain([place])  # until the step that copies it has been launched
        slot = _one(self.slots.allocate(1))
        assert slot is not None, "counted above"
        self._restores.append((place, slot))
        return slot

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        slot = _one(self.slots.allocate(1, evict=evict)) if slot is None else slot
        return None if slot is None else Room(slot, slot)

    def save(self, key: bytes, room: Room, *, worth: float) -> bool:
        self._unconfirmed.add(key)
        return self.slots.publish(room.place, key, worth=worth)

    def take_copies(self) -> tuple[Pairs, Pairs]:
        restores, self._restores = self._restores, []
        return [], restores

    def launch(self, saves: Pairs, restores: Pairs) -> None:
        self._unconfirmed.launch()
        self.slots.release(place for place, _ in restores)

    def confirm(self) -> None:
        self._unconfirmed.confirm()

    def discard(self) -> None:
        self._restores = []
        self.slots.reset(self._unconfirmed.discard())
        self._unconfirmed.clear()


class CompressedStates:
    """Saved states in a pool of their own, where they take less memory. Each is copied there before the next step.

    A sequence that ends gives its slot back at once: the copy runs before all else in the next step, whoever the slot
    belongs to by then. A hit may meet a state whose copy has not run yet, for hits are restored after it.
    """

    def __init__(self, num_slots: int, num_places: int) -> None:
        self.slots, self.places = BlockPool(num_slots), BlockPool(num_places)
        self._saves: Pairs = []
        self._restores: Pairs = []
        self._unconfirmed = Unconfirmed()

    @property
    def capacity(self) -> int:
        return self.places.capacity

    @property
    def num_saved(self) -> int:
        return self.places.num_cached

    def find(self, key: bytes) -> int | None:
        return self.places.lookup(key)

    def was_evicted(self, key: bytes) -> bool:
        return self.places.was_evicted(key)

    def start(self, place: int | None) -> int | None:
        slot = _one(self.slots.allocate(1))
        if slot is not None and place is not None:
            self.places.retain([place])
            self._restores.append((place, slot))
        return slot

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        if self.places.lookup(key) is not None:
            return None
        found = _one(self.slots.allocate(1)) if slot is None else slot
        if found is None:
            return None
        if (place := _one(self.places.allocate(1, evict=evict))) is not None:
            return Room(found, place)
        if slot is None:
            self.slots.release([found])
        return None

    def save(self, key: bytes, room: Room, *, worth: float) -> bool:
        self._unconfirmed.add(key, by_next=True)
        if self.places.publish(room.place, key, worth=worth):
            self._saves.append((room.slot, room.place))
            return True
        self.places.release([room.place])
        return False

    def take_copies(self) -> tuple[Pairs, Pairs]:
        saves, restores, self._saves, self._restores = self._saves, self._restores, [], []
        return saves, restores

    def launch(self, saves: Pairs, restores: Pairs) -> None:
        self._unconfirmed.launch()
        self.places.release(place for _, place in saves)
        self.places.release(place for place, _ in restores)

    def confirm(self) -> None:
        self._unconfirmed.confirm()

    def discard(self) -> None:
        self._saves, self._restores = [], []
        self.slots.reset(frozenset())
        self.places.reset(self._unconfirmed.discard())
        self._unconfirmed.clear()


def _one(ids: list[int] | None) -> int | None:
    return None if ids is None else ids[0]
