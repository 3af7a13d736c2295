"""Unconfirmed: which keys have to be forgotten if a step fails."""

from __future__ import annotations

from collections.abc import Set


class Unconfirmed:
    """Keys of one pool that are findable although the step that writes what they stand for has not been confirmed.

    A step is *launched* when the device has it, and *confirmed* when its results have been read. A device works in the
    order of the launches, so a step may read what was launched before it; but if a step fails, nothing that rests on
    it may be found again.
    """

    def __init__(self) -> None:
        self._launched = self._confirmed = 0  # steps so far
        self._keys: list[tuple[int, bytes]] = []  # (the step that writes its content, key)

    def add(self, key: bytes, *, by_next: bool = False) -> None:
        """`key` is about to be published. The step launched last writes its content, or the next one does."""
        if (step := self._launched + by_next) > self._confirmed:
            self._keys.append((step, key))

    def launch(self) -> None:
        """One more step has been launched."""
        self._launched += 1

    def confirm(self) -> None:
        """The oldest step that was not confirmed is now."""
        self._confirmed += 1
        if self._keys:
            self._keys = [(step, key) for step, key in self._keys if step > self._confirmed]

    def discard(self) -> Set[bytes]:
        """Nothing is under way any more; the keys that were not confirmed."""
        keys = {key for _, key in self._keys}
        self._confirmed = self._launched
        return keys

    def clear(self) -> None:
        """Those keys have been forgotten."""
        self._keys = []
