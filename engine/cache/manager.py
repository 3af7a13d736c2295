"""CacheManager: which pages and which state slot a sequence owns, and what a later request may find again.

A prefix of a sequence, and what is kept of it (block_size 4, tokens left to right):

    [ block 0 ][ block 1 ][ block 2 ][ tail: 2 tokens ........ ]
    key h0     key h1     key h2     key hash(h2, tail tokens)
                    ^ a state saved here has key h1             ^ a state saved here has the tail's key

h(i) = sha256(h(i-1) + tokens of block i), h(-1) comes from the request's salt. A page is findable under the key of what
it holds, a state under the key of the prefix it follows. A hit is a chain of full pages, perhaps a partly filled one
(copied, for its owner will write on), and a state exactly at their end. Bookkeeping only: copies and saves are handed
out as lists.

Where saved states lie is the `StateStore`'s business. Positions are launched and then confirmed; what rests on launched
ones is found by steps that are launched later, and forgotten if a step fails (`Unconfirmed`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.state_store import Pairs, Room, StateStore
from jamba_server.engine.cache.unconfirmed import Unconfirmed
from jamba_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """`num_tokens` need not be computed again, the state after them being at `place` of the store. `shared` is how far
    the pages alone would have reached."""

    num_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    tail_page: int | None = None
    place: int | None = None
    shared: int = 0
    missed_no_state: int = 0
    missed_evicted: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """The state after `position` tokens of `sequence` goes to the slot of `room` in this step, and stays at its
    place."""

    sequence: Sequence
    position: int
    room: Room

    @property
    def slot(self) -> int:
        return self.room.slot


@dataclass(slots=True)
class CacheCopies:
    """(source, destination) pairs to run before the step: `pages`, `saves` from slots to places of the store, and after
    these `states`, from places to slots. In each, destinations are distinct and none is a source."""

    pages: Pairs = field(default_factory=list[tuple[int, int]])
    saves: Pairs = field(default_factory=list[tuple[int, int]])
    states: Pairs = field(default_factory=list[tuple[int, int]])


def chain(previous: bytes, tokens: Iterable[int]) -> bytes:
    """Key of a prefix: the key of what comes before `tokens`, and `tokens`."""
    return sha256(previous + array("q", tokens).tobytes()).digest()


class CacheManager:
    """Pages, the store of states, and the rules between them. `interval`: tokens between regular states, a multiple of
    block_size.

    One sequence of any length always fits: a page more than the longest one has (a copied tail's source), and with
    caching, where saved states lie in slots, a slot more than sequences run (a restored state's source).
    """

    def __init__(
        self, store: StateStore, *, num_pages: int, block_size: int, interval: int, enabled: bool = True
    ) -> None:
        assert interval % block_size == 0, f"interval {interval} is no multiple of the block size {block_size}"
        self.pages, self.store = BlockPool(num_pages), store
        self.block_size, self.interval, self.enabled = block_size, interval, enabled
        self._tails: dict[bytes, list[tuple[int, ...]]] = {}  # key of the last full block -> tails with a state
        self._page_copies: Pairs = []
        self._saves: list[Save] = []
        self._unconfirmed = Unconfirmed()  # of pages

    @property
    def slots(self) -> BlockPool:
        return self.store.slots

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
            if found is None and n and (state := self.store.find(root)) is not None:
                found = (n * self.block_size, None, state)
            if found is not None:
                position, page, state = found
                missed = self._missed(hashes, n, len(blocks)) if position < shared else (0, 0)
                return PrefixHit(position, tuple(blocks[:n]), page, state, max(shared, position), *missed)
        return PrefixHit(0, (), None, None, shared, *self._missed(hashes, 0, len(blocks)))

    def _find_tail(self, seq: Sequence, root: bytes, start: int, limit: int) -> tuple[int, int, int] | None:
        """(position, page, place of the state) of the longest cached tail after `root` that `seq` continues."""
        found: tuple[int, int, int] | None = None
        for tail in self._tails.get(root, ()):
            end = start + len(tail)
            if end > limit or (found and end <= found[0]) or tuple(seq.tokens[start:end]) != tail:
                continue
            key = chain(root, tail)
            page, state = self.pages.lookup(key), self.store.find(key)
            if page is not None and state is not None:
                found = (end, page, state)
        return found

    def _missed(self, hashes: list[bytes], hit: int, shared: int) -> tuple[int, int]:
        """(no_state, evicted): tokens beyond the hit whose pages are or were there, by what is missing. In blocks:
        `hit` of them were hit, `shared` have pages."""
        evicted_to = shared
        while evicted_to < len(hashes) and self.pages.was_evicted(hashes[evicted_to]):
            evicted_to += 1
        lost = next((n for n in range(shared, hit, -1) if self.store.was_evicted(hashes[n - 1])), hit)
        return (shared - lost) * self.block_size, (evicted_to - shared + lost - hit) * self.block_size

    # Owning -----------------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence, hit: PrefixHit, num_tokens: int, *, reserve: int = 0) -> bool:
        """Gives `seq` pages for `num_tokens` and a slot, leaving `reserve` pages free, or changes nothing."""
        sources = () if hit.tail_page is None else (hit.tail_page,)
        need = -(-num_tokens // self.block_size) - len(hit.block_ids)
        revived = sum(self.pages.refs[b] == 0 for b in (*hit.block_ids, *sources))  # free units that the hit takes back
        if need + revived + reserve > self.pages.num_free:
            return False
        if (slot := self.store.start(hit.place)) is None:
            return False
        self.pages.retain((*hit.block_ids, *sources))  # sources are held until the step that copies them is launched
        fresh = self.pages.allocate(need)
        assert fresh is not None, "counted above"
        seq.block_ids, seq.state_id = array("i", (*hit.block_ids, *fresh)), slot
        seq.num_computed, seq.branch = hit.num_tokens, hit.shared
        self._page_copies += [(s, fresh[0]) for s in sources]
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

        The state of its last position is saved: a conversation goes on from there, and so does a preempted sequence.
        """
        if self.enabled and seq.num_computed:
            self._publish_pages(seq, seq.num_computed)
            key = self._key(seq, seq.num_computed)
            if (room := self.store.reserve(key, slot=seq.state_id)) is not None:
                self._publish_state(Save(seq, seq.num_computed, room))
        self.pages.release(reversed(seq.block_ids))  # tails leave the cache before heads
        self.slots.release([seq.state_id])
        seq.vacate()

    # Saving -----------------------------------------------------------------------------------------------------

    def plan_saves(self, seq: Sequence, start: int, end: int) -> list[Save]:
        """Room for the states worth keeping that the chunk (start, end] of `seq` passes, by position. Running sequences
        have been served before; regular states (by interval) push no other saved state out. Where slots are short, the
        best are kept."""
        if not self.enabled or start // self.block_size == end // self.block_size:
            return []  # states are saved at block borders only
        saves: list[Save] = []
        worthy = self._worthy(seq)
        regular = range((start // self.interval + 1) * self.interval, end + 1, self.interval)
        for position in dict.fromkeys([*worthy, *regular]):
            if not start < position <= end or self.store.find(key := self._key(seq, position)) is not None:
                continue
            if (room := self.store.reserve(key, evict=position in worthy)) is not None:
                saves.append(Save(seq, position, room))
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
        """The copies that must run before the step, for which they wait however long. What they read, and the places
        that they write to, are held until `launch`."""
        pages, self._page_copies = self._page_copies, []
        return CacheCopies(pages, *self.store.take_copies())

    # Launched, confirmed, failed --------------------------------------------------------------------------------

    def launch(self, copies: CacheCopies) -> None:
        """The step has been launched: for all that comes after it, its copies are done and its saves hold states."""
        self._unconfirmed.launch()
        self.store.launch(copies.saves, copies.states)
        self.pages.release(source for source, _ in copies.pages)
        for save in self._saves:
            self._publish_pages(save.sequence, save.position)
            self._publish_state(save)
            self.slots.release([save.slot])
        self._saves = []

    def confirm(self) -> None:
        """The results of the oldest step that was launched have been read: what it wrote is right."""
        self._unconfirmed.confirm()
        self.store.confirm()

    def discard(self) -> None:
        """A step has failed, wherever it was. Nobody owns anything any more, and what no confirmed step wrote is
        forgotten."""
        self._page_copies, self._saves = [], []
        self.pages.reset(self._unconfirmed.discard())
        self._unconfirmed.clear()
        self.store.discard()

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
            self._publish_page(block, key)
        if tail:
            self._publish_page(seq.block_ids[n], self._key(seq, position))

    def _publish_page(self, block: int, key: bytes) -> None:
        if self.pages.lookup(key) is None:
            self._unconfirmed.add(key)
            self.pages.publish(block, key)

    def _publish_state(self, save: Save) -> None:
        seq, position = save.sequence, save.position
        if not self.store.save(self._key(seq, position), save.room, worth=self._worth(seq, position)):
            return
        n, tail = divmod(position, self.block_size)
        if tail:
            root = seq.hashes[n - 1] if n else self._root(seq)
            tails = self._tails.setdefault(root, [])
            tails.append(tuple(seq.tokens[position - tail : position]))
            self._drop_dead_tails(root)

    def _worth(self, seq: Sequence, position: int) -> int:
        """Tokens to compute again without the state at `position`: those since the state before it (Marconi,
        arXiv 2411.19379, section 4: slots are all of one size, so cost per byte is cost)."""
        hashes = self._hashes(seq, (position - 1) // self.block_size)
        before = (n for n in range(len(hashes), 0, -1) if self.store.find(hashes[n - 1]) is not None)
        return position - next(before, 0) * self.block_size

    def _drop_dead_tails(self, root: bytes) -> None:
        alive = [t for t in dict.fromkeys(self._tails[root]) if self.store.find(chain(root, t)) is not None]
        self._tails[root] = alive
        if len(self._tails) > 2 * self.store.capacity + 8:
            for other in list(self._tails):
                if not any(self.store.find(chain(other, t)) is not None for t in self._tails[other]):
                    del self._tails[other]
