"""CacheManager: tracks which pages and which state slot a sequence owns, and which prefixes later requests can reuse.

The picture shows a prefix of a sequence and its keys in the cache (block_size 4, tokens from left to right):

    [ block 0 ][ block 1 ][ block 2 ][ tail: 2 tokens ........ ]
    key h0     key h1     key h2     key hash(h2, tail tokens)
                    ^ a state saved here has key h1             ^ a state saved here has the tail's key

h(i) = sha256(h(i-1) + tokens of block i), and h(-1) is a hash of the request's cache salt. A page is found under the
key of the prefix that ends with its last token. A saved state is found under the key of the prefix after which the
state was saved. A prefix hit consists of full pages, perhaps a partly filled page, and a state saved exactly at the end
of the last of these pages. The partly filled page is copied, because the sequence will write to it. The manager moves
no data: it lists the copies and the saves that a step must run.

The class `StateStore` decides where saved states are stored. Pages and states that a launched step writes can be found
by steps that are launched later; if a step fails, the class `Unconfirmed` knows which of these pages and states must be
forgotten.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.chains import Chains
from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.page_index import PageIndex, common_length
from jamba_server.engine.cache.pins import Pins
from jamba_server.engine.cache.policy import SavePolicy
from jamba_server.engine.cache.reuse import Kind
from jamba_server.engine.cache.state_store import Pairs, Room, StateStore
from jamba_server.engine.cache.unconfirmed import Unconfirmed
from jamba_server.engine.sequence import Sequence

if TYPE_CHECKING:
    from jamba_server.engine.cache.tiers.events import Event
    from jamba_server.engine.types import TierStats


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The result of a prefix lookup. The first `num_tokens` tokens need not be computed again; the state after these
    tokens is saved at `place` in the state store. The field `block_ids` has the ids of the full pages of the prefix.
    The field `tail_page` is the id of a partly filled page after the full pages, which must be copied. The field
    `shared` is the number of tokens whose pages were found. The fields `missed_no_state` and `missed_evicted` are
    numbers of tokens that come after the prefix and must be computed again. `missed_no_state` is the number of tokens
    whose pages were found, but after which no state was saved. `missed_evicted` is the number of tokens that were
    cached until a page or a state was evicted."""

    num_tokens: int = 0
    block_ids: tuple[int, ...] = ()
    tail_page: int | None = None
    place: int | None = None
    shared: int = 0
    missed_no_state: int = 0
    missed_evicted: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """A state that a step saves. The step writes the state of `sequence` after its first `position` tokens to the slot
    `room.slot`, and the state store keeps the state at `room.place`. The field `kind` is the reason for the save."""

    sequence: Sequence
    position: int
    room: Room
    kind: Kind = Kind.ANSWER

    @property
    def slot(self) -> int:
        return self.room.slot


@dataclass(slots=True)
class CacheCopies:
    """The copies to run before a step, as (source, destination) pairs of ids. The list `pages` has copies from page to
    page. The list `saves` has copies from state slots to places of the state store. The list `states` has copies from
    places to state slots, which run after the copies in `saves`. In each list all destinations are different, and no
    destination is also a source."""

    pages: Pairs = field(default_factory=list[tuple[int, int]])
    saves: Pairs = field(default_factory=list[tuple[int, int]])
    states: Pairs = field(default_factory=list[tuple[int, int]])

    def __bool__(self) -> bool:
        """Returns whether there is anything to copy."""
        return bool(self.pages or self.saves or self.states)


class CacheManager:
    """Gives KV pages and state slots to sequences, and finds pages and saved states again for later requests. During
    prefill and decode, a state is saved every `interval` tokens, which is a multiple of `block_size`. The object
    `policy` chooses the other positions where states are saved, and says what a saved state is worth.

    The memory plan must ensure that a sequence of the greatest length fits when no other sequence runs. For this, one
    page more than the sequence itself occupies is needed, for the source of a copied page. With prefix caching and the
    state store `SlotStates`, there must also be one slot more than the number of running sequences, for the source of a
    restored state.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        num_pages: int,
        block_size: int,
        interval: int,
        enabled: bool = True,
        policy: SavePolicy | None = None,
    ) -> None:
        assert interval % block_size == 0, f"interval {interval} is not a multiple of the block size {block_size}"
        self.pages, self.store = BlockPool(num_pages, ages=False), store
        self.policy = SavePolicy(store.capacity) if policy is None else policy
        self.block_size, self.interval, self.enabled = block_size, interval, enabled
        self.pins = Pins(self.pages, store.saved)
        self._index = PageIndex(self.pages.capacity)
        # Maps the key of a prefix of full blocks to the token lists, shorter than a block, that follow this prefix and
        # after which a state is saved.
        self._tails: dict[bytes, list[tuple[int, ...]]] = {}
        self._page_copies: Pairs = []
        self._saves: list[Save] = []
        self._unconfirmed = Unconfirmed()  # tracks the keys of pages; the state store tracks the keys of saved states
        self.chains = Chains()
        if self.policy.protects_pages:
            self.pages.on_loss, self.store.saved.on_loss = self._page_lost, self._state_lost

    @property
    def slots(self) -> BlockPool:
        return self.store.slots

    # Finding cached prefixes ------------------------------------------------------------------------------------

    def match(self, seq: Sequence, limit: int | None = None) -> PrefixHit:
        """Returns the longest prefix of `seq` whose pages are all cached and at whose end a state is saved. The prefix
        has at most `limit` tokens, or as many as may be reused if `limit` is None. Changes nothing."""
        if not self.enabled:
            return PrefixHit()
        limit = seq.num_reusable if limit is None else limit
        hashes = self.page_keys(seq, limit // self.block_size)
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
        """Finds a state that was saved inside the block after the prefix with key `root`, and a page with the keys and
        values up to this state. Of several such states, the one after the most tokens is chosen. Returns (position of
        the state in `seq`, page, place of the state), or None if there is no such state. `start` is the number of
        tokens in the prefix. The returned position is at most `limit`."""
        found: tuple[int, int, int] | None = None
        for tail in self._tails.get(root, ()):
            end = start + len(tail)
            if end > limit or (found and end <= found[0]) or tuple(seq.tokens[start:end]) != tail:
                continue
            state, page = self.store.find(chain(root, tail)), self._page_with(root, tail)
            if page is not None and state is not None:
                found = (end, page, state)
        return found

    def _page_with(self, root: bytes, tail: tuple[int, ...]) -> int | None:
        """Returns a page that follows the prefix with key `root` and begins with the tokens `tail`, or None."""
        if (page := self.pages.lookup(chain(root, tail))) is not None:
            return page
        longer = (tokens for tokens in self._index.after(root) if tokens[: len(tail)] == tail)
        return next((page for t in longer if (page := self.pages.lookup(chain(root, t))) is not None), None)

    def shared_tokens(self, seq: Sequence, hit: PrefixHit) -> tuple[int, bool]:
        """Returns how many tokens at the beginning of `seq` have keys and values in the cache, to the token, and
        whether the cached tokens go on differently there. `hit` is the result of `match`."""
        full = hit.shared - hit.shared % self.block_size
        root = self._key(seq, full)
        rest = seq.tokens[full : min(full + self.block_size, len(seq.tokens) - 1)]
        alive = (t for t in self._index.after(root) if self.pages.lookup(chain(root, t)) is not None)
        lengths = ((common_length(tokens, rest), len(tokens)) for tokens in alive)
        common, length = max(lengths, key=lambda pair: (pair[0], -pair[1]), default=(0, 0))
        return full + common, common < min(length, len(rest))

    def deepest_state(self, seq: Sequence, hit: PrefixHit) -> int:
        """Returns the number of tokens at the beginning of `seq` after which the last state is saved, whether or not
        the keys and values before it are still cached. `hit` is the result of `match`."""
        keys = self.page_keys(seq, (len(seq.tokens) - 1) // self.block_size)
        blocks = (n for n in range(len(keys), 0, -1) if self.store.find(keys[n - 1]) is not None)
        return max(hit.num_tokens, next(blocks, 0) * self.block_size)

    def _missed(self, hashes: list[bytes], hit: int, shared: int) -> tuple[int, int]:
        """Returns (no_state, evicted) for the tokens after a prefix hit: the number of tokens that have pages but no
        saved state, and the number of tokens that were cached until a page or a state was evicted. The prefix hit has
        `hit` blocks; the first `shared` blocks of the sequence have pages."""
        evicted_to = shared
        while evicted_to < len(hashes) and self.pages.was_evicted(hashes[evicted_to]):
            evicted_to += 1
        lost = next((n for n in range(shared, hit, -1) if self.store.was_evicted(hashes[n - 1])), hit)
        return (shared - lost) * self.block_size, (evicted_to - shared + lost - hit) * self.block_size

    # Methods with an effect only in a cache with tiers (`engine/cache/tiers/cache.py`) ----------------------------

    @property
    def is_restoring(self) -> bool:
        """Returns whether a sequence waits for its prefix to be read from a disk."""
        return False

    def expect(self, seq: Sequence) -> int:
        """Returns how many tokens of a new sequence will be found in the cache."""
        return self.match(seq).num_tokens

    def seek(self, seq: Sequence) -> bool:
        """Returns whether `seq`, which is about to start, must wait because its prefix has to be read from a disk."""
        return False

    def give_up(self, seq: Sequence) -> None:
        """Must be called when a sequence that waits for its prefix ends."""

    def take(self, event: Event) -> None:
        """Takes what the threads of the disk tier have done."""

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds until everything is written to the disk."""

    @property
    def tier_stats(self) -> TierStats | None:
        return None

    # Giving pages and slots to sequences, and taking pages and slots back ---------------------------------------

    def admit(self, seq: Sequence, hit: PrefixHit, num_tokens: int, *, reserve: int = 0) -> bool:
        """Gives `seq` a state slot and pages for `num_tokens` tokens, and reuses the pages of `hit`. Returns False, and
        changes nothing, if no slot is free or if fewer than `reserve` pages would remain free."""
        sources = () if hit.tail_page is None else (hit.tail_page,)
        need = -(-num_tokens // self.block_size) - len(hit.block_ids)
        # Pages of the hit that no sequence uses count as free at this point, but these pages will be in use once they
        # are given to `seq`.
        revived = sum(self.pages.refs[b] == 0 for b in (*hit.block_ids, *sources))
        if need + revived + reserve > self.pages.num_free:
            return False
        if (slot := self.store.start(hit.place)) is None:
            return False
        if hit.place is not None:
            key = self._key(seq, hit.num_tokens)
            if (worth := self.policy.hit(key, hit.num_tokens)) is not None:
                self.store.saved.appraise(key, worth)
        # The method `launch` releases the source page once the copy from this page has been launched.
        self.pages.retain((*hit.block_ids, *sources))
        fresh = self.pages.allocate(need)
        assert fresh is not None, "the free pages were counted above"
        seq.block_ids, seq.state_id = array("i", (*hit.block_ids, *fresh)), slot
        seq.num_computed, seq.branch = hit.num_tokens, hit.shared
        self._page_copies += [(s, fresh[0]) for s in sources]
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Gives `seq` further pages, so that it has room for `num_tokens` tokens. Returns False, and changes nothing,
        if too few pages are free."""
        need = -(-num_tokens // self.block_size) - len(seq.block_ids)
        if need <= 0:
            return True
        if (ids := self.pages.allocate(need)) is None:
            return False
        seq.block_ids.extend(ids)
        return True

    def free(self, seq: Sequence) -> None:
        """Takes back the pages and the slot of `seq`. If prefix caching is enabled, later requests can find these pages
        until the pages are evicted.

        The state after the last computed token is saved, because the next turn of the conversation continues from this
        state. A preempted sequence also continues from this state when the sequence is resumed.
        """
        if self.enabled and seq.request.cache.write and seq.num_computed:
            self._publish_pages(seq, seq.num_computed)
            key, saves = self._key(seq, seq.num_computed), self.policy.saves_answers
            if saves and (room := self.store.reserve(key, slot=seq.state_id)) is not None:
                self._publish_state(Save(seq, seq.num_computed, room, Kind.ANSWER))
        # The last page is released first. Pages released first are evicted first, and a later page of a sequence is
        # useless without the earlier pages.
        self.pages.release(reversed(seq.block_ids))
        self.slots.release([seq.state_id])
        seq.vacate()

    # Choosing and reserving the states that a step saves --------------------------------------------------------

    def plan_saves(self, seq: Sequence, start: int, end: int) -> list[Save]:
        """Reserves room for the states that a step should save while the step computes the tokens of `seq` from index
        `start` to index `end` - 1. Returns the saves in the order of their positions. This method must be called after
        all running sequences have got their pages. If too few slots are free for all states, the states that most
        likely lead to prefix hits are saved. To save a regular state (one every `interval` tokens) or the state of a
        short prompt, no other saved state is evicted."""
        if not self.enabled or not seq.request.cache.write:
            return []
        ends_short = self._is_short(seq) and start < seq.num_prompt - 1
        if start // self.block_size == end // self.block_size and not ends_short:
            return []  # apart from short prompts, states are saved at block boundaries only; this step reaches none
        saves: list[Save] = []
        kinds: dict[int, Kind] = {}  # the kind of each position; the most likely position comes first
        for position, kind in self._worthy(seq):
            kinds.setdefault(position, kind)
        for position in range((start // self.interval + 1) * self.interval, end + 1, self.interval):
            kinds.setdefault(position, Kind.INTERVAL)
        for position, kind in kinds.items():
            if not start < position <= end or self.store.find(key := self._key(seq, position)) is not None:
                continue
            evict = kind is not Kind.INTERVAL and position % self.block_size == 0
            if (room := self.store.reserve(key, evict=evict)) is not None:
                saves.append(Save(seq, position, room, kind))
        self._saves += saves
        return sorted(saves, key=lambda save: save.position)

    def saves_after(self, position: int) -> bool:
        """Returns whether the state after the token at index `position` is a regular state (one every `interval`
        tokens), which the step that decodes this token should save."""
        return self.enabled and (position + 1) % self.interval == 0

    def worthy_positions(self, seq: Sequence) -> list[int]:
        """Returns the positions where a saved state most likely leads to a prefix hit, the most likely position
        first."""
        return [position for position, _ in self._worthy(seq)]

    def _worthy(self, seq: Sequence) -> Iterator[tuple[int, Kind]]:
        """Yields the positions that the policy chooses, with their kinds. Each position is rounded down to a block
        boundary, except that of a prompt with less than a block."""
        for position, kind in self.policy.positions(seq):
            yield position - position % self.block_size, kind
        if self._is_short(seq):
            yield seq.num_prompt - 1, Kind.PROMPT

    def _is_short(self, seq: Sequence) -> bool:
        """Returns whether no block of the prompt can be reused as a whole, because at least the last token of a prompt
        is computed."""
        return 1 < seq.num_prompt <= self.block_size

    def pin(self, seq: Sequence) -> int | None:
        """Protects the pages and the saved states of `seq` from eviction if its request asks for that. Must be called
        just before `free`. Returns how many tokens are protected: all that were computed, or 0 if pins would then take
        more than their share of the memory. Returns None if the request asks for no pin."""
        if not (seconds := seq.request.cache.pin_seconds):
            return None
        if not self.enabled or not seq.request.cache.write or not seq.num_computed:
            return 0
        end = seq.num_computed
        pages = [*self.page_keys(seq, end // self.block_size), self._key(seq, end)]
        positions = {end, *(p for p in self.worthy_positions(seq) if 0 < p < end)}
        keys = {position: self._key(seq, position) for position in sorted(positions)}
        states = [key for position, key in keys.items() if position == end or self.store.find(key) is not None]
        return end if self.pins.add(seq.request.id, pages, states, seconds) else 0

    def take_copies(self) -> CacheCopies:
        """Returns the copies that must run before the next step. The pages, slots and places that these copies read
        stay referenced until the method `launch` is called."""
        pages, self._page_copies = self._page_copies, []
        return CacheCopies(pages, *self.store.take_copies())

    # Tracking a step from its launch until it is confirmed or fails ---------------------------------------------

    def launch(self, copies: CacheCopies) -> None:
        """Records that a step was launched and that `copies` were launched before it. From now on, lookups find the
        states that this step saves, because only later steps will read these states. The sources of the copies are
        released."""
        self._unconfirmed.launch()
        self.store.launch(copies.saves, copies.states)
        self.pages.release(source for source, _ in copies.pages)
        for save in self._saves:
            # A partly filled page of a running sequence is published later, under the key that it has then.
            self._publish_pages(save.sequence, save.position - save.position % self.block_size)
            self._publish_state(save)
            self.slots.release([save.slot])
        self._saves = []

    def confirm(self) -> None:
        """Confirms the oldest launched step that is not confirmed yet. The caller has read the results of this step
        without an error."""
        self._unconfirmed.confirm()
        self.store.confirm()

    def discard(self) -> None:
        """Recovers from a failed step, wherever in the step the error occurred. Takes all pages and slots back, and
        forgets all pages and states that no confirmed step has written."""
        self._page_copies, self._saves = [], []
        self.pages.reset(self._unconfirmed.discard())
        self._unconfirmed.clear()
        self.store.discard()
        for key in [*self.chains.restrict(self.store.saved.keys), *self.chains]:
            self.pages.appraise(key, float(key in self.chains))

    # Computing and publishing the keys of prefixes --------------------------------------------------------------

    def page_keys(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Returns the keys of the first `num_blocks` full blocks of `seq`."""
        return self.all_page_keys(seq, num_blocks)[:num_blocks]

    def all_page_keys(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Returns the keys of all full blocks of `seq` that are known, at least of the first `num_blocks`. Each key is
        computed once and stored in `seq.hashes`, which is returned without a copy."""
        while len(seq.hashes) < num_blocks:
            start = len(seq.hashes) * self.block_size
            previous = seq.hashes[-1] if seq.hashes else self._root(seq)
            seq.hashes.append(chain(previous, seq.tokens[start : start + self.block_size]))
        return seq.hashes

    def _root(self, seq: Sequence) -> bytes:
        return sha256(seq.request.cache_salt.encode()).digest()

    def _key(self, seq: Sequence, position: int) -> bytes:
        n = position // self.block_size
        hashes = self.page_keys(seq, n)
        root = hashes[-1] if n else self._root(seq)
        tail = seq.tokens[n * self.block_size : position]
        return chain(root, tail) if tail else root

    def _publish_pages(self, seq: Sequence, position: int) -> None:
        n, tail = divmod(position, self.block_size)
        for i, (block, key) in enumerate(zip(seq.block_ids, self.page_keys(seq, n), strict=False)):
            self._publish_page(seq, i, block, key)
        if tail:
            self._publish_page(seq, n, seq.block_ids[n], self._key(seq, position), tail)

    def _publish_page(self, seq: Sequence, number: int, block: int, key: bytes, length: int | None = None) -> None:
        """Makes a page of `seq` findable. `number` is the number of the page in the sequence, and `length` the number
        of tokens in it (None: it is full)."""
        if self.pages.lookup(key) is None:
            self._unconfirmed.add(key)
            if self.pages.publish(block, key):
                start = number * self.block_size
                root = seq.hashes[number - 1] if number else self._root(seq)
                tokens = tuple(seq.tokens[start : start + (length or self.block_size)])
                self._index.add(root, tokens, lambda root, t: self.pages.lookup(chain(root, t)) is not None)

    def _publish_state(self, save: Save) -> None:
        seq, position = save.sequence, save.position
        key = self._key(seq, position)
        worth = 0.0 if self.store.find(key) is not None else self.policy.saved(key, position, save.kind)
        if not self.store.save(key, save.room, worth=worth):
            return
        n, tail = divmod(position, self.block_size)
        # The only page of a prompt with less than a block is not findable yet, so nothing can be protected.
        if self.policy.protects_pages and (n or self.pages.lookup(key) is not None):
            for page in self.chains.add([*self.page_keys(seq, n), key] if tail else self.page_keys(seq, n)):
                self.pages.appraise(page, 1.0)
        if tail:
            root = seq.hashes[n - 1] if n else self._root(seq)
            tails = self._tails.setdefault(root, [])
            tails.append(tuple(seq.tokens[position - tail : position]))
            self._drop_dead_tails(root)

    # Keeping pages and saved states together --------------------------------------------------------------------

    def _state_lost(self, key: bytes) -> None:
        """Pages that only the lost state needed are evicted before pages that a saved state needs."""
        for page in self.chains.remove(key):
            self.pages.appraise(page, 0.0)

    def _page_lost(self, key: bytes) -> None:
        """No request can continue from the states that need the lost page, so they make room for others."""
        for state in self.chains.states_after(key):
            self.store.saved.forget(state)

    def _drop_dead_tails(self, root: bytes) -> None:
        alive = [t for t in dict.fromkeys(self._tails[root]) if self.store.find(chain(root, t)) is not None]
        self._tails[root] = alive
        if len(self._tails) > 2 * self.store.capacity + 8:
            for other in list(self._tails):
                if not any(self.store.find(chain(other, t)) is not None for t in self._tails[other]):
                    del self._tails[other]
