"""Pins: protects the pages and saved states of a prefix from eviction, within a share of the memory.

A pin has a name, and it lasts until it is released by this name. Nothing here reads a clock: `EngineCore` asks the
inbox which pins have ended. A pin holds no reference, so running sequences still get every page and slot that they
need.
"""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.engine.cache.block_pool import BlockPool

MAX_PINS = 4096  # a pin of a prefix that is pinned already takes no memory of the cache, but its name does
PINNED_PART = 2  # pins protect at most 1/PINNED_PART of the pages and of the saved states


class Pins:
    """The pins of one cache. `pages` hands out pages, and `states` the places of saved states."""

    def __init__(self, pages: BlockPool, states: BlockPool) -> None:
        self._pages, self._states = pages, states
        self._new: list[tuple[str, float]] = []
        self._held: dict[str, tuple[list[bytes], list[bytes]]] = {}  # the keys of pages and of states, by name

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def add(self, name: str, pages: Iterable[bytes], states: Iterable[bytes], seconds: float) -> bool:
        """Pins the pages and the states with these keys for a number of seconds, which others measure. A pin with the
        same name is released first. Returns False, and pins nothing, if there are too many pins or if more than the
        allowed share of the memory would be pinned."""
        self.release(name)
        if len(self._held) >= MAX_PINS:
            return False
        held = list(dict.fromkeys(pages)), list(dict.fromkeys(states))
        for pool, keys in zip((self._pages, self._states), held, strict=True):
            new = sum(not pool.is_pinned(key) for key in keys)
            if pool.num_pinned + new > pool.capacity // PINNED_PART:
                return False
        self._held[name] = held
        self._pages.pin(held[0])
        self._states.pin(held[1])
        self._new.append((name, seconds))
        return True

    def take_new(self) -> list[tuple[str, float]]:
        """Returns, for each pin since the last call, its name and the number of seconds that it lasts. The caller
        measures the time and then calls `release`."""
        new, self._new = self._new, []
        return new

    def release(self, name: str) -> None:
        """Ends a pin. Names that are not pinned are ignored, because a pin may have ended before."""
        pages, states = self._held.pop(name, ((), ()))
        self._pages.unpin(pages)
        self._states.unpin(states)
