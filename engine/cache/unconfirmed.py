"""Unconfirmed: tracks the cache keys that must be forgotten if the step that writes their content fails."""

from __future__ import annotations

from collections.abc import Set


class Unconfirmed:
    """Tracks the keys of one pool that lookups can find already, although the step that writes their content has not
    been confirmed.

    A step is *launched* when it has been passed to the device, and *confirmed* when its results have been read. A
    device runs steps in the order of their launches, so a step is allowed to read what an earlier step writes. But if a
    step fails, the keys of all pages and states that this step and the later steps wrote must be forgotten.
    """

    def __init__(self) -> None:
        self._launched = self._confirmed = 0  # the number of launched steps and the number of confirmed steps
        # Each entry is (number of the step that writes the content of the key, key).
        self._keys: list[tuple[int, bytes]] = []

    def add(self, key: bytes, *, by_next: bool = False) -> None:
        """Records that `key` is about to be published. The page or state with this key is written by the most recently
        launched step or, if `by_next` is true, by the step that is launched next."""
        if (step := self._launched + by_next) > self._confirmed:
            self._keys.append((step, key))

    def launch(self) -> None:
        """Records that one more step was launched."""
        self._launched += 1

    def confirm(self) -> None:
        """Confirms the oldest launched step that is not confirmed yet."""
        self._confirmed += 1
        if self._keys:
            self._keys = [(step, key) for step, key in self._keys if step > self._confirmed]

    def discard(self) -> Set[bytes]:
        """Gives up all launched steps that are not confirmed, and returns the keys whose content these steps would have
        written. The keys stay recorded until the method `clear` is called, so that an interrupted recovery can be
        repeated."""
        keys = {key for _, key in self._keys}
        self._confirmed = self._launched
        return keys

    def clear(self) -> None:
        """Drops the keys that the method `discard` returned. The caller calls `clear` after the pool has forgotten
        these keys."""
        self._keys = []
