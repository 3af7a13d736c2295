"""BlockPool: ids of equal-sized cache units. Used twice, for KV pages and for state slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set
from heapq import heapify, heappop, heappush


class BlockPool:
    """Reference-counted, content-addressed ids.

    A unit without references keeps its content and key until its id is handed out again, so "cached" means "free, but
    still findable". Units without a key are handed out first, then the cached one of least rank. Its rank is its worth
    upon the rank of the last one evicted (GreedyDual, Young 1994): of equal worth the least recently used goes first,
    and what is worth more stays longer, but not for ever. Id 0 is never handed out (padding). Keys of evicted units
    are remembered for a while, so that a miss can be explained.
    """

    def __init__(self, size: int) -> None:
        self.refs = [0] * size
        self._keys: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        self._worth: dict[int, float] = {}
        self._empty = list(range(size - 1, 0, -1))  # free without a key; the last is handed out first
        self._ranks: dict[int, tuple[float, int]] = {}  # free with a key: (rank, time of its release)
        self._queue: list[tuple[float, int, int]] = []  # heap of (*rank, id); entries that no longer hold are skipped
        self._clock = 0.0  # rank of the last unit evicted
        self._releases = 0
        self._lost: OrderedDict[bytes, None] = OrderedDict()
        self.evicted: list[tuple[int, bytes]] = []  # (id, key) of the units that the last `allocate` evicted

    @property
    def capacity(self) -> int:
        return len(self.refs) - 1

    @property
    def num_free(self) -> int:
        """Units without references, whether they are findable or not."""
        return len(self._empty) + len(self._ranks)

    @property
    def num_cached(self) -> int:
        """Units with a key."""
        return len(self._keys)

    def lookup(self, key: bytes) -> int | None:
        return self._ids.get(key)

    def was_evicted(self, key: bytes) -> bool:
        """Whether `key` was cached and lost lately (as many keys are remembered as four pools hold)."""
        return key in self._lost

    def allocate(self, n: int, *, evict: bool = True) -> list[int] | None:
        """`n` ids with one reference each, or None and nothing happens. Without `evict`, cached units stay."""
        if n > (self.num_free if evict else len(self._empty)):
            return None
        self.evicted = []
        ids = [self._empty.pop() if self._empty else self._evict() for _ in range(n)]
        for i in ids:
            self.refs[i] = 1
        return ids

    def retain(self, ids: Iterable[int]) -> None:
        """A reference more to units that were found."""
        for i in ids:
            if self.refs[i] == 0:
                del self._ranks[i]
            self.refs[i] += 1

    def release(self, ids: Iterable[int]) -> None:
        for i in ids:
            assert self.refs[i] > 0, f"unit {i} released twice"
            self.refs[i] -= 1
            if self.refs[i] == 0:
                self._set_free(i)

    def publish(self, i: int, key: bytes, *, worth: float = 0.0) -> bool:
        """Makes unit `i` findable, unless it or another unit has that content already. It must be referenced.

        `worth`: what losing it would cost, in any unit that all units of the pool share.
        """
        assert self.refs[i] > 0, f"unit {i} is nobody's"
        if key in self._ids or i in self._keys:
            return False
        self._keys[i], self._ids[key], self._worth[i] = key, i, worth
        self._lost.pop(key, None)
        return True

    def reset(self, forgotten: Set[bytes]) -> None:
        """Takes all references back and forgets some keys. Whatever a failed step left half done is set right: all that
        counts is which unit has which key."""
        self._keys = {i: key for i, key in self._keys.items() if key not in forgotten}
        self._ids = {key: i for i, key in self._keys.items()}
        self._worth = {i: self._worth.get(i, 0.0) for i in self._keys}
        self._ranks = {i: self._ranks.get(i, (self._clock + worth, self._releases)) for i, worth in self._worth.items()}
        self._empty = [i for i in range(self.capacity, 0, -1) if i not in self._keys]
        self._rebuild_queue()
        self.refs = [0] * len(self.refs)

    def _set_free(self, i: int) -> None:
        if i not in self._keys:
            self._empty.append(i)
            return
        self._releases += 1
        self._ranks[i] = (self._clock + self._worth[i], self._releases)
        heappush(self._queue, (*self._ranks[i], i))
        if len(self._queue) > 2 * len(self.refs):
            self._rebuild_queue()

    def _rebuild_queue(self) -> None:
        self._queue = [(*rank, i) for i, rank in self._ranks.items()]
        heapify(self._queue)

    def _evict(self) -> int:
        """The cached unit of least rank, its content forgotten."""
        while True:
            rank, released, i = heappop(self._queue)
            if self._ranks.get(i) == (rank, released):
                break
        self._clock = rank
        del self._ranks[i], self._worth[i]
        key = self._keys.pop(i)
        del self._ids[key]
        self.evicted.append((i, key))
        self._lost[key] = None
        if len(self._lost) > 4 * len(self.refs):
            self._lost.popitem(last=False)
        return i
