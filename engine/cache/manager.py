"""CacheManager: which pages and which state slot a sequence owns, and what a later request may find again.

A prefix of a sequence, and what is kept of it (block_size 4, tokens left to right):

    [ block 0 ][ block 1 ][ block 2 ][ tail: 2 tokens ........ ]
    key h0     key h1     key h2     key hash(h2, tail tokens)
                    ^ a state saved here has key h1             ^ a state saved here has the tail's key

h(i) = sha256(h(i-1) + tokens of block i), h(-1) comes from the request's salt. A page is findable under the key of what
it holds, a state under the key of the prefix it follows. A hit is a chain of full pages, perhaps a partly filled one
(copied, for its owner will write on), and a state exactly at their end. Bookkeeping only: copies and saves are handed
out as lists.

Saved states lie in the slots that sequences run in, or compressed in slots of their own. Then nothing is kept without
a copy, which waits for the next step. Such copies run before all else in it, so the slot they read is free at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """`num_tokens` need not be computed again. `shared` is how far the pages alone would have reached."""

    num_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    tail_page: int | None = None
    state_id: int | None = None
    shared: int = 0
    missed_no_state: int = 0
    missed_evicted: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """The state after `position` tokens of `sequence` goes to `slot` in this step, and from there to `state_id`, where
    it is kept: the same slot, or a compressed one."""

    sequence: Sequence
    position: int
    slot: int
    state_id: int


@dataclass(slots=True)
class CacheCopies:
    """(source, destination) pairs to run before the step: `pages`, `saves` from slots to compressed states, and after
    these `states`, from saved states to slots. In each, destinations are distinct and none is a source."""

    pages: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    saves: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    states: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


def chain(previous: bytes, tokens: Iterable[int]) -> bytes:
    """Key of a prefix: the key of what comes before `tokens`, and `tokens`."""
    return sha256(previous + array("q", tokens).tobytes()).digest()


class CacheManager:
    """Pools and the rules between them. `interval`: tokens between regular states, a multiple of block_size.

    `slots` are of running sequences and of states on their way, `states` of saved ones: one pool, or two where
    `num_compressed` says how many compressed ones there are. One sequence of any length always fits: a page more than
    the longest one has (a copied tail's source), and with caching, in one pool, a slot more than sequences run (a
    restored state's source).
    """

    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        block_size: int,
        interval: int,
        num_compressed: int = 0,
        enabled: bool = True,
    ) -> None:
        assert interval % block_size == 0, f"interval {interval} is no multiple of the block size {block_size}"
        self.pages, self.slots = BlockPool(num_pages), BlockPool(num_slots)
        self.states = BlockPool(num_compressed) if num_compressed else self.slots
        self.compresses = num_compressed > 0
        self.block_size, self.interval, self.enabled = block_size, interval, enabled
        self._tails: dict[bytes, list[tuple[int, ...]]] = {}  # key of the last full block -> tails with a state
        self._copies = CacheCopies()
        self._saves: list[Save] = []

    # Looking up -------------------------------------------------------------------------------------------------

    def match(self, seq: Sequence) -> PrefixHit:
        """The longest prefix that has all its pages and a state at its end. Changes nothing."""
        if not self.enabled:
            return PrefixHit()
        limit = len(seq.tokens) - 1  # one token is left to compute: its logits are wanted
        hashes = self._hashes(seq, limit // self.block_size)
        blocks: list[int] = []
        for key in hashes:
            if (block := self.pages.lookup(key)) is None:
                break
            blocks.append(block)
        shared = len(blocks) * self.block_size
        for n in range(len(blocks), -1, -1):
            root = hashes[n - 1] if n else self._root(seq)
            found = self._find_tail(seq, root, n * self.block_size, limit)
            if found is None and n and (state := self.states.lookup(root)) is not None:
                found = (n * self.block_size, None, state)
            if found is not None:
                position, page, state = found
                missed = self._missed(hashes, n, len(blocks)) if position < shared else (0, 0)
                return PrefixHit(position, tuple(blocks[:n]), page, state, max(shared, position), *missed)
        return PrefixHit(0, (), None, None, shared, *self._missed(hashes, 0, len(blocks)))

    def _find_tail(self, seq: Sequence, root: bytes, start: int, limit: int) -> tuple[int, int, int] | None:
        """(position, page, state) of the longest cached tail after `root` that `seq` continues."""
        found: tuple[int, int, int] | None = None
        for tail in self._tails.get(root, ()):
            end = start + len(tail)
            if end > limit or (found and end <= found[0]) or tuple(seq.tokens[start:end]) != tail:
                continue
            key = chain(root, tail)
            page, state = self.pages.lookup(key), self.states.lookup(key)
            if page is not None and state is not None:
                found = (end, page, state)
        return found

    def _missed(self, hashes: list[bytes], hit: int, shared: int) -> tuple[int, int]:
        """(no_state, evicted): tokens beyond the hit whose pages are or were there, by what is missing. In blocks:
        `hit` of them were hit, `shared` have pages."""
        evicted_to = shared
        while evicted_to < len(hashes) and self.pages.was_evicted(hashes[evicted_to]):
            evicted_to += 1
        lost = next((n for n in range(shared, hit, -1) if self.states.was_evicted(hashes[n - 1])), hit)
        return (shared - lost) * self.block_size, (evicted_to - shared + lost - hit) * self.block_size

    # Owning -----------------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence, hit: PrefixHit, num_tokens: int, *, reserve: int = 0) -> bool:
        """Gives `seq` pages for `num_tokens` and a slot, leaving `reserve` pages free, or changes nothing."""
        sources = () if hit.tail_page is None else (hit.tail_page,)
        states = () if hit.state_id is None else (hit.state_id,)
        need = -(-num_tokens // self.block_size) - len(hit.block_ids)
        revived = sum(self.pages.refs[b] == 0 for b in (*hit.block_ids, *sources))  # free units that the hit takes back
        if need + revived + reserve > self.pages.num_free:
            return False
        if 1 + sum(self.states.refs[s] == 0 for s in states if not self.compresses) > self.slots.num_free:
            return False
        self.pages.retain((*hit.block_ids, *sources))  # sources are held until the step that copies them is done
        self.states.retain(states)
        fresh, slots = self.pages.allocate(need), self.slots.allocate(1)
        assert fresh is not None, "counted above"
        assert slots is not None, "counted above"
        seq.block_ids, [seq.state_id] = array("i", (*hit.block_ids, *fresh)), slots
        seq.num_computed, seq.branch = hit.num_tokens, hit.shared
        self._copies.pages += [(s, fresh[0]) for s in sources]
        self._copies.states += [(s, seq.state_id) for s in states]
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room for `num_tokens` tokens of `seq`, or changes nothing."""
        need = -(-num_tokens // self.block_size) - len(seq.block_ids)
        if need <= 0:
            return True
        if (ids := self.pages.allocate(need)) is None:
            return False
        seq.block_ids.extend(ids)
        return True

    def free(self, seq: Sequence) -> None:
        """Takes back what `seq` owns; what it computed stays findable until the room is needed.

        Its slot becomes the checkpoint of its last position: a conversation goes on from there, and so does a preempted
        sequence, without a copy unless states are compressed.
        """
        if self.enabled and seq.num_computed:
            self._publish_pages(seq, seq.num_computed)
            if (state_id := self._place(seq, seq.num_computed, seq.state_id, evict=True)) is not None:
                self._keep(Save(seq, seq.num_computed, seq.state_id, state_id))
        self.pages.release(reversed(seq.block_ids))  # tails leave the cache before heads
        self.slots.release([seq.state_id])
        seq.block_ids, seq.state_id, seq.num_computed, seq.branch = array("i"), 0, 0, 0

    # Saving -----------------------------------------------------------------------------------------------------

    def plan_saves(self, seq: Sequence, start: int, end: int) -> list[Save]:
        """Slots for the states worth keeping that the chunk (start, end] of `seq` passes, by position. Running
        sequences have been served before; regular states (by interval) push no other checkpoint out. Compressed ones
        pass through slots that nobody runs in: where these are short, the best are kept."""
        if not self.enabled or start // self.block_size == end // self.block_size:
            return []  # states are saved at block borders only
        saves: list[Save] = []
        worthy = self._worthy(seq)
        regular = range((start // self.interval + 1) * self.interval, end + 1, self.interval)
        for position in dict.fromkeys([*worthy, *regular]):
            if not start < position <= end or self.states.lookup(self._key(seq, position)) is not None:
                continue
            evict = position in worthy
            if (slots := self.slots.allocate(1, evict=evict)) is None:
                break
            if (state_id := self._place(seq, position, slots[0], evict=evict)) is None:
                self.slots.release(slots)
                continue
            saves.append(Save(seq, position, slots[0], state_id))
        self._saves += saves
        return sorted(saves, key=lambda save: save.position)

    def saves_after(self, position: int) -> bool:
        """Whether a state after one more token than `position`, all of them past a prompt, may be saved."""
        return self.enabled and (position + 1) % self.interval == 0

    def _worthy(self, seq: Sequence) -> list[int]:
        """Positions worth a state, best first: message boundaries, where others branched off, the prompt's end (also
        one token earlier, for the same prompt again)."""
        boundaries = [*seq.request.save_positions, seq.branch, seq.num_prompt, seq.num_prompt - 1]
        return [p - p % self.block_size for p in boundaries]

    def take_copies(self) -> CacheCopies:
        """The copies that must run before the step, for which they wait however long. Saved states that are copied,
        from or to, and pages are held until `commit`."""
        copies, self._copies = self._copies, CacheCopies()
        return copies

    def commit(self, copies: CacheCopies) -> None:
        """The step is under way: for all that comes after it, its copies are done and its saves hold states."""
        self.pages.release(source for source, _ in copies.pages)
        self.states.release(destination for _, destination in copies.saves)
        self.states.release(source for source, _ in copies.states)
        for save in self._saves:
            self._publish_pages(save.sequence, save.position)
            self._keep(save)
            self.slots.release([save.slot])
        self._saves = []

    def _place(self, seq: Sequence, position: int, slot: int, *, evict: bool) -> int | None:
        """Where the state that is in `slot`, or will be, can stay: there, or in a compressed slot. None if that is
        nowhere, or is not needed."""
        if not self.compresses:
            return slot
        if self.states.lookup(self._key(seq, position)) is not None:
            return None
        states = self.states.allocate(1, evict=evict)
        return None if states is None else states[0]

    def _keep(self, save: Save) -> None:
        """Makes a state findable. Its slot holds it; if it is to be compressed, the next step will do so first."""
        kept = self._publish_state(save.sequence, save.position, save.state_id)
        if self.compresses and kept:
            self._copies.saves.append((save.slot, save.state_id))
        elif self.compresses:  # another one of this step's is the same
            self.states.release([save.state_id])

    # Keys -------------------------------------------------------------------------------------------------------

    def _root(self, seq: Sequence) -> bytes:
        return sha256(seq.request.cache_salt.encode()).digest()

    def _hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Keys of the first `num_blocks` full blocks, computed once and kept with the sequence."""
        while len(seq.hashes) < num_blocks:
            start = len(seq.hashes) * self.block_size
            previous = seq.hashes[-1] if seq.hashes else self._root(seq)
            seq.hashes.append(chain(previous, seq.tokens[start : start + self.block_size]))
        return seq.hashes[:num_blocks]

    def _key(self, seq: Sequence, position: int) -> bytes:
        n = position // self.block_size
        hashes = self._hashes(seq, n)
        root = hashes[-1] if n else self._root(seq)
        tail = seq.tokens[n * self.block_size : position]
        return chain(root, tail) if tail else root

    def _publish_pages(self, seq: Sequence, position: int) -> None:
        n, tail = divmod(position, self.block_size)
        for block, key in zip(seq.block_ids, self._hashes(seq, n), strict=False):
            self.pages.publish(block, key)
        if tail:
            self.pages.publish(seq.block_ids[n], self._key(seq, position))

    def _publish_state(self, seq: Sequence, position: int, state_id: int) -> bool:
        """Whether it was not there yet."""
        if not self.states.publish(state_id, self._key(seq, position), worth=self._worth(seq, position)):
            return False
        n, tail = divmod(position, self.block_size)
        if tail:
            root = seq.hashes[n - 1] if n else self._root(seq)
            tails = self._tails.setdefault(root, [])
            tails.append(tuple(seq.tokens[position - tail : position]))
            self._drop_dead_tails(root)
        return True

    def _worth(self, seq: Sequence, position: int) -> int:
        """Tokens to compute again without the state at `position`: those since the state before it (Marconi,
        arXiv 2411.19379, section 4: slots are all of one size, so cost per byte is cost)."""
        hashes = self._hashes(seq, (position - 1) // self.block_size)
        before = (n for n in range(len(hashes), 0, -1) if self.states.lookup(hashes[n - 1]) is not None)
        return position - next(before, 0) * self.block_size

    def _drop_dead_tails(self, root: bytes) -> None:
        alive = [t for t in dict.fromkeys(self._tails[root]) if self.states.lookup(chain(root, t)) is not None]
        self._tails[root] = alive
        if len(self._tails) > 2 * self.states.capacity + 8:
            for other in list(self._tails):
                if not any(self.states.lookup(chain(other, t)) is not None for t in self._tails[other]):
                    del self._tails[other]
