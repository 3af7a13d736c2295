"""Reuse: counts how often the saved states of each kind are used again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """The reason why a state is saved at its position."""

    MESSAGE = 0  # a message ends there
    BRANCH = 1  # the sequence differs from there on from another sequence
    PROMPT = 2  # the prompt ends there
    ANSWER = 3  # the sequence itself ends there, or was preempted
    INTERVAL = 4  # a multiple of the distance between regular states


class Life(NamedTuple):
    """The time from a save or a hit of a saved state to its next hit or its eviction. States are counted apart by
    their kind, and by whether they have been hit before: a reply is usually continued once, a system prompt often."""

    kind: Kind
    was_hit: bool


class Reuse:
    """Estimates for each kind of life the share that ends with a hit.

    All counts are integers and depend on nothing but the calls, so that the estimates are the same wherever the calls
    are the same. Once MEMORY lives of one kind have been counted, both counts of this kind are halved, so that old
    lives weigh less than new ones.
    """

    MEMORY = 512

    def __init__(self, capacity: int) -> None:
        """`capacity` is the number of saved states whose lives are remembered."""
        self._capacity = capacity
        self._lives: OrderedDict[bytes, Life] = OrderedDict()
        self._begun: Counter[Life] = Counter()
        self._hits: Counter[Life] = Counter()

    def save(self, key: bytes, kind: Kind) -> Life:
        """Records that a state was saved under `key`."""
        return self._begin(key, Life(kind, was_hit=False))

    def hit(self, key: bytes) -> Life | None:
        """Records that a sequence continues from the state saved under `key`. Returns the life that begins, or None if
        the state is no longer remembered."""
        if (life := self._lives.get(key)) is None:
            return None
        self._hits[life] += 1
        return self._begin(key, Life(life.kind, was_hit=True))

    def share(self, life: Life) -> float:
        """Returns the estimated share of such lives that end with a hit: 1/2 as long as nothing is known."""
        return (self._hits[life] + 1) / (self._begun[life] + 2)

    def _begin(self, key: bytes, life: Life) -> Life:
        self._lives[key] = life
        self._lives.move_to_end(key)
        if len(self._lives) > self._capacity:
            self._lives.popitem(last=False)
        self._begun[life] += 1
        if self._begun[life] >= self.MEMORY:
            self._begun[life] //= 2
            self._hits[life] //= 2
        return life
