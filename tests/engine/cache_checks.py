"""Checks of a simulated engine: what requests read from the cache, write to it and pin, and for what they wait. The
checks compute everything again, from the tokens alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import sha256

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.state_store import Room
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.sequence import Sequence


def prefix_keys(salt: str, tokens: Iterable[int], block_size: int) -> Iterator[bytes]:
    """Yields the keys of all prefixes of a text, the shortest prefix first."""
    root, block = sha256(salt.encode()).digest(), list[int]()
    for token in tokens:
        block.append(token)
        key = sha256(root + array("q", block).tobytes()).digest()
        yield key
        if len(block) == block_size:
            root, block = key, []


class CacheChecks:
    """Watches the pools of one scheduler's cache, and for what its sequences wait. `take_pins` must be called after
    each step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.cache = scheduler, scheduler.cache
        self.held: dict[str, tuple[set[bytes], set[bytes]]] = {}  # the pages and states that each pin protects
        self.ended: dict[str, tuple[set[bytes], set[bytes]]] = {}  # the same, of requests that have pinned and ended
        self.num_waits = self.num_pins = self.num_evicted_pins = 0
        for pool in self.pools:
            self._watch(pool)
        self._watch_saves()
        self._watch_waiting()

    @property
    def pools(self) -> tuple[BlockPool, BlockPool]:
        return self.cache.pages, self.cache.store.saved

    def pinned(self, pool: BlockPool) -> set[bytes]:
        number = self.pools.index(pool)
        return {key for keys in self.held.values() for key in keys[number]}

    def _watch(self, pool: BlockPool) -> None:
        allocate = pool.allocate

        def watched(n: int, *, evict: bool = True, evict_pinned: bool = True) -> list[int] | None:
            before = cached(pool)
            ids = allocate(n, evict=evict, evict_pinned=evict_pinned)
            after = cached(pool)
            if lost := self.pinned(pool) & (before - after):
                self.num_evicted_pins += len(lost)
                assert all(map(pool.is_pinned, after)), "a pinned block went before one that is not pinned"
            return ids

        pool.allocate = watched

    def _watch_saves(self) -> None:
        store, pool = self.cache.store, self.cache.store.saved
        reserve = store.reserve

        def watched(key: bytes, *, slot: int | None = None, evict: bool = True) -> Room | None:
            before = self.pinned(pool) & cached(pool)
            room = reserve(key, slot=slot, evict=evict)
            assert before <= cached(pool), "a pinned state made room for another saved state"
            return room

        store.reserve = watched

    def _watch_waiting(self) -> None:
        joining = self.scheduler.joining
        must_wait = joining.must_wait

        def watched(seq: Sequence, running: Iterable[Sequence], work: int) -> bool:
            waits = must_wait(seq, running, work)
            if waits:
                self.num_waits += 1
                assert any(self.pays(seq, other) for other in running), "a sequence waits for nothing"
            return waits

        joining.must_wait = watched

    def pays(self, seq: Sequence, other: Sequence) -> bool:
        """Returns whether it pays for `seq` to wait for `other`: `other` runs, writes to the cache, and has yet to
        compute tokens that both have."""
        ours, theirs = list(seq.tokens[:-1]), list(other.tokens[: other.num_prompt])
        pairs = zip(ours, theirs, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        same_group = seq.request.group and seq.request.group == other.request.group
        least = self.cache.block_size if same_group else self.scheduler.joining.min_saved
        return (
            seq.request.cache_salt == other.request.cache_salt
            and seq.request.cache.read
            and other.request.cache.write
            and other in self.scheduler.running
            and other.num_computed < shared
            and shared >= least
        )

    def take_pins(self) -> list[str]:
        """Returns the names of the pins that begin now."""
        names = [name for name, _ in self.cache.pins.take_new()]
        self.num_pins += len(names)
        for name in names:
            self.held[name] = self.ended[name]
        for pool in self.pools:
            assert pool.num_pinned <= pool.capacity // 2, "pins have more than their share"
        return names

    def end(self, seq: Sequence, tokens: list[int], num_pinned: int | None) -> None:
        """Must be called when a request ends. Checks that the prefix which it asked to pin is pinned."""
        if not num_pinned:
            return
        keys = list(prefix_keys(seq.request.cache_salt, tokens[:num_pinned], self.cache.block_size))
        size = self.cache.block_size
        pages = {keys[end - 1] for end in (*range(size, num_pinned + 1, size), num_pinned)}
        self.ended[seq.request.id] = pages, {keys[-1]}
        assert all(self.cache.pages.is_pinned(key) for key in pages), "a page of a pinned prefix is not pinned"
        assert self.cache.store.saved.is_pinned(keys[-1]), "the state of a pinned prefix is not pinned"

    def unpin(self, names: Iterable[str]) -> None:
        for name in names:
            self.cache.pins.release(name)
            del self.held[name]

    def finish(self, texts: dict[Sequence, list[int]]) -> None:
        """Must be called when nothing runs. Checks that only the pages and states can be found that requests were
        allowed to write."""
        size = self.cache.block_size
        allowed = {
            key
            for seq, tokens in texts.items()
            if seq.request.cache.write
            for key in prefix_keys(seq.request.cache_salt, tokens, size)
        }
        for pool in self.pools:
            assert set(keys_of(pool).values()) <= allowed, "a request that must not write has left something behind"
            assert not pool.num_pinned or self.held


def keys_of(pool: BlockPool) -> dict[int, bytes]:
    """Returns the keys of all blocks that can be found, by the ids of the blocks."""
    return vars(pool)["_keys"]


def cached(pool: BlockPool) -> set[bytes]:
    """Returns the keys of the blocks that no sequence uses."""
    return {key for i, key in keys_of(pool).items() if pool.refs[i] == 0}
