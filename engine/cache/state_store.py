"""The protocol `StateStore`: tracks where saved states are stored, and lists the copies that save and restore these
states. A store itself moves no data.

There are two stores. The class `SlotStates` leaves a state in the slot that the state was written to. The class
`CompressedStates` compresses a state and copies it to a separate pool. Both keep states on the device; the tiers in
`engine.cache.tiers` keep copies in host memory and on a disk. A store decides where a state is kept, and lists the
copies that must run before the next step. The module `engine.state_copies` runs these copies.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.unconfirmed import Unconfirmed

Pairs = list[tuple[int, int]]


class Room(NamedTuple):
    """The memory reserved for one saved state: a step writes the state to the state slot `slot`, and the store keeps
    the state at `place`."""

    slot: int
    place: int


class StateStore(Protocol):
    """Decides where saved states are stored. Each saved state is found by the key of the token prefix after which it
    was saved. A *place* is a number that says where a saved state is stored; only the store knows the meaning of this
    number. All state slots are handed out by the store, so that the store learns which saved states are evicted to free
    a slot."""

    # A slot holds the state of a running sequence or a saved state. If a store has a separate pool for saved states, a
    # saved state stays in a slot only until it has been copied to this pool.
    slots: BlockPool

    @property
    def saved(self) -> BlockPool:
        """Returns the pool on the device in which saved states are found by their keys. It may be `slots`."""
        ...

    @property
    def capacity(self) -> int:
        """Returns how many saved states fit into the store."""
        ...

    @property
    def num_saved(self) -> int:
        """Returns the number of saved states that the method `find` can find now."""
        ...

    def find(self, key: bytes) -> int | None:
        """Returns the place of the state that is saved under `key`, or None if there is no such state. Changes
        nothing."""
        ...

    def was_evicted(self, key: bytes) -> bool:
        """Returns whether a state saved under `key` was evicted recently."""
        ...

    def start(self, place: int | None) -> int | None:
        """Returns a slot for a sequence. If `place` is not None, the state saved at `place` is copied to the slot
        before the next step. Returns None, and changes nothing, if no slot is free."""
        ...

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        """Reserves room for a state under `key`. If the argument `slot` is given, the state is in this slot already; if
        it is None, the store chooses a slot and the next step writes the state there. Returns None if no slot or no
        place is free. A store is also allowed to return None if a state is saved under `key` already. If `evict` is
        false, no saved state is evicted to make room. A pinned saved state is never evicted for another saved
        state."""
        ...

    def save(self, key: bytes, room: Room, *, worth: float) -> bool:
        """Makes the state in `room` findable under `key`. The state must have been written to `room.slot` already, or
        the most recently launched step must write it there. Returns False, and gives the place back, if another state
        is saved under `key` already. Whether True or False is returned, the caller must still release the slot."""
        ...

    def take_copies(self) -> tuple[Pairs, Pairs]:
        """Returns the copies that must run before the next step: first a list of (slot, place) pairs that save states,
        then a list of (place, slot) pairs that restore states. The slots and places in the lists stay referenced until
        `launch` is called."""
        ...

    def launch(self, saves: Pairs, restores: Pairs) -> None:
        """Records that a step was launched, and that the copies `saves` and `restores` were launched before it.
        Releases the places in both lists."""
        ...

    def confirm(self) -> None:
        """Confirms the oldest launched step that is not confirmed yet. The caller has read the results of this step
        without an error."""
        ...

    def discard(self) -> None:
        """Recovers from a failed step: takes all slots back, and forgets the states that no confirmed step has
        written."""
        ...


class SlotStates:
    """A store that keeps saved states in the same pool of slots as the states of running sequences.

    Saving a state copies nothing, because the slot that holds the state is kept. A prefix hit copies the saved state to
    a new slot, in which the new sequence runs.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = BlockPool(num_slots)
        self._restores: Pairs = []
        self._unconfirmed = Unconfirmed()

    @property
    def saved(self) -> BlockPool:
        return self.slots

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    @property
    def num_saved(self) -> int:
        return self.slots.num_cached

    @property
    def pending_slots(self) -> set[int]:
        """Returns the slots to which a copy will be made before the next step."""
        return {slot for _, slot in self._restores}

    def find(self, key: bytes) -> int | None:
        return self.slots.lookup(key)

    def was_evicted(self, key: bytes) -> bool:
        return self.slots.was_evicted(key)

    def start(self, place: int | None) -> int | None:
        if place is None:
            return _one(self.slots.allocate(1))
        if 1 + (self.slots.refs[place] == 0) > self.slots.num_free:
            return None
        # The method `launch` releases `place` once the copy from `place` to the new slot has been launched.
        self.slots.retain([place])
        slot = _one(self.slots.allocate(1))
        assert slot is not None, "the free slots were counted above"
        self._restores.append((place, slot))
        return slot

    def reserve(self, key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
        slot = _one(self.slots.allocate(1, evict=evict, evict_pinned=False)) if slot is None else slot
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
    """A store that compresses saved states and keeps them in a separate pool. Each state is copied to this pool before
    the next step runs.

    A sequence that ends gives its slot back at once. The next step is allowed to use this slot for another sequence,
    because the saved state is copied from the slot before the step writes to the slot. A prefix hit is allowed to use a
    state whose copy has not run yet, because the copies that save states run before the copies that restore states.
    """

    def __init__(self, num_slots: int, num_places: int) -> None:
        self.slots, self.places = BlockPool(num_slots), BlockPool(num_places)
        self._saves: Pairs = []
        self._restores: Pairs = []
        self._unconfirmed = Unconfirmed()

    @property
    def saved(self) -> BlockPool:
        return self.places

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
        if (place := _one(self.places.allocate(1, evict=evict, evict_pinned=False))) is not None:
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
