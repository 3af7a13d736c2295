"""The class `BlockPool`: hands out the ids of cache blocks. A block is a KV page, a state slot or a compressed saved
state; each of these three kinds has a pool of its own."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Set
from heapq import heapify, heappop, heappush


class BlockPool:
    """Hands out the ids of cache blocks, counts the references to each block, and finds a block by the key of its
    content.

    A block without references is free. A free block that has a key keeps its content and key until its id is handed out
    again; until then it is called cached. Free blocks without a key are handed out first. If no such block exists, the
    cached block with the lowest eviction priority is evicted. The priority of a block is set when the block is
    released: the cost of losing the block's content (the argument `worth` of `publish`) plus the priority of the most
    recently evicted block (GreedyDual, Young 1994). Of blocks of equal cost, the least recently used one is therefore
    evicted first. A block of higher cost stays longer, but not for ever. Id 0 is never handed out: padding rows use it.
    The pool remembers the keys of the most recently evicted blocks, so that statistics can count the cache misses that
    are due to an eviction.

    A pinned key protects its block: while another cached block is left, that one is evicted first, and `allocate` can
    be told to evict no pinned block at all. A key can be pinned before a block has it, and several times.
    """

    def __init__(self, size: int, *, ages: bool = True) -> None:
        """Makes a pool of `size` blocks, including block 0. If `ages` is false, priorities do not age: a block of a
        lower cost is always evicted before a block of a higher cost, and the least recently used of equal blocks
        first."""
        self._ages = ages
        # Called with the key of each block that is evicted or forgotten, but not by `reset`.
        self.on_loss: Callable[[bytes], None] = lambda key: None
        self.refs = [0] * size
        self._keys: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        self._worth: dict[int, float] = {}
        # The ids of free blocks without a key. The id at the end of this list is handed out first.
        self._empty = list(range(size - 1, 0, -1))
        # Maps the id of each cached block to (eviction priority, release number). The block with the lowest priority is
        # evicted first. The release number is the value of the counter `_releases` when the block was released; it
        # orders blocks of equal priority.
        self._ranks: dict[int, tuple[float, int]] = {}
        # A heap of (priority, release number, id) for the cached blocks. An entry that differs from the block's entry
        # in `_ranks` is out of date and is skipped.
        self._queue: list[tuple[float, int, int]] = []
        self._clock = 0.0  # the eviction priority of the most recently evicted block
        self._releases = 0
        self._lost: OrderedDict[bytes, None] = OrderedDict()
        self._pins: Counter[bytes] = Counter()
        # The ids of cached blocks without references whose key is pinned. They are in `_ranks` but not in `_queue`.
        self._pinned: set[int] = set()
        # (id, key) of each block that the most recent call of `allocate` evicted.
        self.evicted: list[tuple[int, bytes]] = []

    @property
    def capacity(self) -> int:
        return len(self.refs) - 1

    @property
    def num_free(self) -> int:
        """Returns the number of blocks without references. These blocks are counted whether they have a key or not."""
        return len(self._empty) + len(self._ranks)

    @property
    def num_cached(self) -> int:
        """Returns the number of blocks with a key. These blocks are counted whether they have references or not."""
        return len(self._keys)

    @property
    def keys(self) -> Iterable[bytes]:
        """Returns the keys of all blocks that have one."""
        return self._ids.keys()

    def lookup(self, key: bytes) -> int | None:
        return self._ids.get(key)

    def was_evicted(self, key: bytes) -> bool:
        """Returns whether the block that had `key` was evicted recently. The pool remembers the keys of the most
        recently evicted blocks. The number of remembered keys is at most four times the number of blocks in the
        pool."""
        return key in self._lost

    def allocate(self, n: int, *, evict: bool = True, evict_pinned: bool = True) -> list[int] | None:
        """Returns the ids of `n` free blocks and gives each of these blocks one reference. Returns None, and changes
        nothing, if fewer than `n` blocks are free. If `evict` is false, only blocks without a key are handed out, so
        that no block is evicted. If `evict_pinned` is false, no block with a pinned key is evicted."""
        spared = 0 if evict_pinned else len(self._pinned)
        if n > (self.num_free - spared if evict else len(self._empty)):
            return None
        self.evicted = []
        ids = [self._empty.pop() if self._empty else self._evict() for _ in range(n)]
        for i in ids:
            self.refs[i] = 1
        return ids

    def retain(self, ids: Iterable[int]) -> None:
        """Adds one reference to each block in `ids`. Each of these blocks must have a reference already, or be free and
        still have its key."""
        for i in ids:
            if self.refs[i] == 0:
                del self._ranks[i]
                self._pinned.discard(i)
            self.refs[i] += 1

    def release(self, ids: Iterable[int]) -> None:
        for i in ids:
            assert self.refs[i] > 0, f"block {i} released twice"
            self.refs[i] -= 1
            if self.refs[i] == 0:
                self._set_free(i)

    def publish(self, i: int, key: bytes, *, worth: float = 0.0) -> bool:
        """Makes block `i`, which must have a reference, findable under `key`. Returns False, and changes nothing, if
        the block has a key already or another block has this key.

        The argument `worth` is the cost of losing the block's content. All calls for one pool must give this cost in
        the same measure, for example as the number of tokens to compute again.
        """
        assert self.refs[i] > 0, f"block {i} has no reference"
        if key in self._ids or i in self._keys:
            return False
        self._keys[i], self._ids[key], self._worth[i] = key, i, worth
        self._lost.pop(key, None)
        return True

    @property
    def num_pinned(self) -> int:
        """Returns the number of pinned keys, whether a block has the key or not."""
        return len(self._pins)

    def is_pinned(self, key: bytes) -> bool:
        return key in self._pins

    def pin(self, keys: Iterable[bytes]) -> None:
        """Pins each of `keys` once more. The block that has the key, now or later, is protected from eviction."""
        for key in keys:
            self._pins[key] += 1
            if (i := self._ids.get(key)) is not None and i in self._ranks:
                self._pinned.add(i)

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Takes back one pin of each of `keys`."""
        for key in keys:
            assert self._pins[key] > 0, "the key is not pinned"
            self._pins[key] -= 1
            if self._pins[key]:
                continue
            del self._pins[key]
            if (i := self._ids.get(key)) in self._pinned:
                self._pinned.discard(i)
                self._enqueue(i)

    def appraise(self, key: bytes, worth: float) -> None:
        """Changes the cost of losing the block that has `key`, if there is such a block."""
        if (i := self._ids.get(key)) is None:
            return
        self._worth[i] = worth
        if i in self._ranks:
            self._ranks[i] = (self._clock + worth, self._ranks[i][1])
            self._enqueue(i)

    def forget(self, key: bytes) -> None:
        """Takes `key` away from its block, if there is such a block, as if the block had been evicted."""
        if (i := self._ids.get(key)) is None:
            return
        if self._ranks.pop(i, None) is not None:
            self._pinned.discard(i)
            self._empty.append(i)
        self._lose(i)

    def reset(self, forgotten: Set[bytes]) -> None:
        """Drops the references to all blocks and forgets the keys in the set `forgotten`. All other fields of the pool
        are rebuilt from the map of ids to keys, because a failed step might have left these fields inconsistent."""
        self._keys = {i: key for i, key in self._keys.items() if key not in forgotten}
        self._ids = {key: i for i, key in self._keys.items()}
        self._worth = {i: self._worth.get(i, 0.0) for i in self._keys}
        self._ranks = {i: self._ranks.get(i, (self._clock + worth, self._releases)) for i, worth in self._worth.items()}
        self._empty = [i for i in range(self.capacity, 0, -1) if i not in self._keys]
        self._pinned = {i for i, key in self._keys.items() if key in self._pins}
        self._rebuild_queue()
        self.refs = [0] * len(self.refs)

    def _set_free(self, i: int) -> None:
        if i not in self._keys:
            self._empty.append(i)
            return
        self._releases += 1
        self._ranks[i] = (self._clock + self._worth[i], self._releases)
        if self._keys[i] in self._pins:
            self._pinned.add(i)
        self._enqueue(i)

    def _enqueue(self, i: int) -> None:
        if i in self._pinned:
            return
        heappush(self._queue, (*self._ranks[i], i))
        if len(self._queue) > 2 * len(self.refs):
            self._rebuild_queue()

    def _rebuild_queue(self) -> None:
        self._queue = [(*rank, i) for i, rank in self._ranks.items() if i not in self._pinned]
        heapify(self._queue)

    def _evict(self) -> int:
        """Forgets the key of the cached block with the lowest eviction priority and returns the id of that block. A
        block with a pinned key is chosen only if there is no other cached block."""
        i = self._lowest()
        self._clock = max(self._clock, self._ranks[i][0]) if self._ages else 0.0
        self._pinned.discard(i)
        del self._ranks[i]
        self.evicted.append((i, self._keys[i]))
        self._lose(i)
        return i

    def _lowest(self) -> int:
        while self._queue:
            rank, released, i = heappop(self._queue)
            if self._ranks.get(i) == (rank, released) and i not in self._pinned:
                return i
        return min(self._pinned, key=self._ranks.__getitem__)

    def _lose(self, i: int) -> None:
        """Takes the key of block `i` away and remembers that it was evicted."""
        key = self._keys.pop(i)
        del self._ids[key], self._worth[i]
        self._lost[key] = None
        if len(self._lost) > 4 * len(self.refs):
            self._lost.popitem(last=False)
        self.on_loss(key)
