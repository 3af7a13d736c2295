"""A model without numbers for testing the scheduler and the cache: a state is the hash of all tokens before it.

Whatever the scheduler reads (pages, slots, saved states) is checked against a recomputation from the tokens, so that a
page that was overwritten, a state from another position or a lost copy is found at the step in which it would have done
harm.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from random import Random

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.manager import CacheCopies, CacheManager
from jamba_server.engine.cache.state_store import CompressedStates, SlotStates, StateStore
from jamba_server.engine.scheduler import Chunk, ChunkResult, Scheduler, SchedulerOutput
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import BACKGROUND_PRIORITY, CacheUse, Request, SamplingParams, TokenUpdate
from tests.engine.host_states import HostStates


def fold(state: int, token: int) -> int:
    return hash((state, token))


def fold_all(tokens: list[int]) -> int:
    state = 0
    for token in tokens:
        state = fold(state, token)
    return state


class HostMemory(dict[int, int]):
    """The saved states at the places of the store `HostStates`, some of which are slots."""

    def __init__(self, slots: dict[int, int], first: int) -> None:
        self._slots, self._first = slots, first

    def __getitem__(self, place: int) -> int:
        return self._slots[place] if place < self._first else super().__getitem__(place)


def saved_states(store: StateStore, slots: dict[int, int]) -> dict[int, int]:
    """Returns the saved states at the places of a store."""
    if isinstance(store, HostStates):
        return HostMemory(slots, store.first)
    return slots if isinstance(store, SlotStates) else {}


class Simulator:
    """Runs the steps of a scheduler. In place of keys and values, a page has for each token the hash of all tokens up
    to it (`fold`). In place of a state, a slot or a compressed state has the hash of all tokens before the next one.

    With `ahead`, a step runs before the scheduler has seen the tokens of the step before it. With several `stages`,
    this number of steps run before the scheduler sees the tokens of the first of them."""

    def __init__(
        self, scheduler: Scheduler, *, ahead: bool = False, second: float = 1.0, model: int = 0, stages: int = 1
    ) -> None:
        self.model = model  # another model has other pages and states for the same text
        # The clock moves on by `second` seconds in each step.
        self.scheduler, self.ahead, self.second = scheduler, ahead, second
        self.under_way: deque[tuple[SchedulerOutput, list[ChunkResult]]] = deque()
        self.stages = stages
        self.chosen: dict[Sequence, list[int]] = {}  # the sampled tokens that the scheduler has not seen yet
        self.num_ahead = 0
        self.block_size = scheduler.cache.block_size
        self.pages: dict[tuple[int, int], int] = {}
        self.slots: dict[int, int] = {}
        self.saved = saved_states(scheduler.cache.store, self.slots)
        self.texts: dict[Sequence, list[int]] = {}  # the known tokens of every sequence that has run
        self.computed: dict[Sequence, set[int]] = {}  # the positions that each request for a vector has computed
        self.num_vectors = 0
        self.time = 0.0
        self.num_saves = 0
        self.num_tail_hits = 0
        self.num_saved = 0
        self.num_only_copies = 0

    def step(self, choose: Callable[[Chunk], int]) -> list[TokenUpdate]:
        self.time += self.second
        updates = self.take() if self.stages == 1 and self.scheduler.must_wait() else []
        output = self.scheduler.schedule(now=self.time)
        self.check_output(output)
        results: list[ChunkResult] = []
        if output.chunks or output.copies:  # otherwise EngineCore launches no step
            self.num_only_copies += not output.chunks
            self.copy(output.copies)
            results = [self.run(chunk, choose) for chunk in output.chunks]
            self.scheduler.advance(output)
            self.under_way.append((output, results))
        self.check_integrity()
        for chunk, result in zip(output.chunks, results, strict=True):
            if result.token_ids:
                self.chosen.setdefault(chunk.sequence, []).extend(result.token_ids)
        most = max(self.ahead, self.stages - 1) if output.chunks else 0
        return updates + (self.take() if len(self.under_way) > most else [])

    def fail(self, choose: Callable[[Chunk], int], *, advances: bool) -> None:
        """Runs a step that fails after it has run, together with all steps under way. All pages and states that the
        step wrote are overwritten with wrong numbers. With `advances`, the scheduler has recorded the step's launch."""
        if self.scheduler.must_wait():
            self.take()
        output = self.scheduler.schedule(now=self.time)
        if output.chunks:
            self.copy(output.copies)
            for chunk in output.chunks:
                self.run(chunk, choose)
                for slot in (chunk.sequence.state_id, *(save.slot for save in chunk.saves)):
                    self.slots[slot] = -1
                for position in range(chunk.start, chunk.end):
                    page = chunk.sequence.block_ids[position // self.block_size]
                    self.pages[page, position % self.block_size] = -1
            for destination in (destination for _, destination in output.copies.saves):
                self.saved[destination] = -1
            if advances:
                self.scheduler.advance(output)
        self.scheduler.discard()
        self.under_way.clear()
        self.chosen = {}
        self.check_integrity()

    def take(self) -> list[TokenUpdate]:
        """Gives the results of the oldest step under way, if there is one, to the scheduler. Returns the updates."""
        if not self.under_way:
            return []
        output, results = self.under_way.popleft()
        for chunk, result in zip(output.chunks, results, strict=True):
            for token_id in result.token_ids:
                assert self.chosen[chunk.sequence].pop(0) == token_id
        updates = self.scheduler.update(output, results)
        self.check_integrity()
        return updates

    def check_output(self, output: SchedulerOutput) -> None:
        cost = sum(self.cost(chunk) for chunk in output.chunks)
        assert cost <= self.scheduler.max_num_batched_tokens
        if cost > self.scheduler.max_num_mixed_tokens:
            sequences = [chunk.sequence for chunk in output.chunks]
            assert not any(seq.decodes for seq in sequences), "a reply waits for a step without a reply's limit"
            ends = [c.end - c.start == c.sequence.num_remaining for c in output.chunks]
            assert len(ends) == 1 or not any(ends), "a prompt waits for others, in a step without a reply's limit"
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        decodes = [c.is_decode for c in output.chunks]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        assert len({c.sequence for c in output.chunks}) == len(output.chunks)
        copies, store = output.copies, self.scheduler.cache.store
        in_slots = type(store) is SlotStates
        for pairs, within_one_pool in ((copies.pages, True), (copies.states, in_slots), (copies.saves, False)):
            destinations = [d for _, d in pairs]
            assert len(set(destinations)) == len(destinations), "a destination is written twice"
            assert not (within_one_pool and {s for s, _ in pairs} & set(destinations)), "a source is written"
        written = [s.slot for c in output.chunks for s in c.saves] + [c.sequence.state_id for c in output.chunks]
        assert len(set(written)) == len(written), "two states go to one slot"
        if isinstance(store, CompressedStates):
            saves = [s.room.place for c in output.chunks for s in c.saves] + [d for _, d in copies.saves]
            assert len(set(saves)) == len(saves), "two states go to one compressed slot"
            if output.chunks:
                held = {i for i, count in enumerate(store.places.refs) if count}
                assert held == {*saves, *(s for s, _ in copies.states)}, "a compressed slot leaked or is not held"
        elif in_slots:
            assert not {s for s, _ in copies.states} & set(written), "a saved state that is copied is overwritten"
            assert not copies.saves

    @staticmethod
    def cost(chunk: Chunk) -> int:
        """Returns how many tokens of the budget a chunk takes. A decoded token takes none, but forced tokens after it
        do."""
        size = chunk.end - chunk.start
        return size - 1 if size <= 1 + chunk.sequence.num_forced else size

    def copy(self, copies: CacheCopies) -> None:
        for source, destination in copies.pages:
            self.num_tail_hits += 1
            for offset in range(self.block_size):
                if (source, offset) in self.pages:
                    self.pages[destination, offset] = self.pages[source, offset]
        for source, destination in copies.saves:
            self.saved[destination] = self.slots[source]
        for source, destination in copies.states:
            self.slots[destination] = self.saved[source]

    def finish(self) -> None:
        """Must be called when nothing runs. Runs the copies that wait for a step. Then checks that all pages and slots
        are free, and that every saved state that can be found is the right one."""
        cache = self.scheduler.cache
        copies = cache.take_copies()
        self.copy(copies)
        cache.launch(copies)
        assert not any(count for pool in self.pools() for count in pool.refs)
        self.check_chains()
        for seq, tokens in self.texts.items():
            for key, state in self.prefixes(seq.request.cache_salt, tokens):
                if (place := cache.store.find(key)) is not None:
                    assert self.saved[place] == state, "a saved state is not that of its prefix"
                    self.num_saved += 1

    def check_chains(self) -> None:
        """Checks that the cache protects exactly the pages that its saved states need, and that it has all of them."""
        cache = self.scheduler.cache
        needed: set[bytes] = set()
        states: set[bytes] = set()
        short: set[bytes] = set()
        for seq, tokens in self.texts.items():
            chain: list[bytes] = []
            for position, (key, _) in enumerate(self.prefixes(seq.request.cache_salt, tokens), start=1):
                if cache.store.saved.lookup(key) is not None:
                    needed |= {*chain, key}
                    states.add(key)
                    short |= set() if chain else {key}
                if position % self.block_size == 0:
                    chain.append(key)
        assert set(cache.store.saved.keys) == states, "a state was saved that no text has"
        # The state of a prompt with less than a block may be there before its page can be found.
        assert needed - short <= set(cache.chains) <= needed, "other pages are protected than saved states need"
        for page in needed - short:
            assert cache.pages.lookup(page) is not None, "a state stays although a page that it needs is gone"

    def prefixes(self, salt: str, tokens: list[int]) -> Iterator[tuple[bytes, int]]:
        """Yields the key of each prefix, computed anew, and the state after the prefix."""
        root, state = sha256(salt.encode()).digest(), self.before(salt)
        for position, token in enumerate(tokens):
            state, start = fold(state, token), position - position % self.block_size
            key = sha256(root + array("q", tokens[start : position + 1]).tobytes()).digest()
            yield key, state
            if position % self.block_size == self.block_size - 1:
                root = key

    def before(self, salt: str) -> int:
        """Returns the state before the first token. It depends on the cache salt, so a prefix of a request with another
        salt has other states, and its use is noticed."""
        return 100 * self.model + len(salt)

    def run(self, chunk: Chunk, choose: Callable[[Chunk], int]) -> ChunkResult:
        seq, size = chunk.sequence, self.block_size
        saves = {save.position: save.slot for save in chunk.saves}
        tokens = [*seq.tokens, *self.chosen.get(seq, ())]
        assert chunk.start == seq.num_computed < chunk.end <= len(tokens)
        assert len(tokens) == len(seq.tokens) + seq.num_pending
        assert self.stages == 1 or not seq.num_pending, "a stage does not know the tokens of the steps after it"
        if chunk.is_ahead:
            self.num_ahead += 1
            assert chunk.is_decode and not seq.counts_tokens, "a token that is not known would be counted or saved"
            assert len(tokens) - seq.num_prompt < seq.params.max_tokens, "nobody wants what follows the last token"
            assert len(tokens) < self.scheduler.max_model_len, "it has all the tokens that it may have"
        before = self.before(seq.request.cache_salt)
        state = self.slots[seq.state_id] if chunk.start else before
        for position in range(chunk.start, chunk.end):
            state = fold(state, tokens[position])
            self.pages[seq.block_ids[position // size], position % size] = state
            if position + 1 in saves:
                self.slots[saves.pop(position + 1)] = state
                self.num_saves += 1
        assert not saves, "a save lies outside its chunk"
        self.slots[seq.state_id] = state
        expected = before
        for position in range(chunk.end):
            expected = fold(expected, tokens[position])
            assert self.pages[seq.block_ids[position // size], position % size] == expected, "page corrupted"
        assert state == expected, "state corrupted"
        self.texts[seq] = tokens
        self.check_hidden_states(chunk)
        if not chunk.num_sampled:
            return ChunkResult()
        forced = seq.constraint.forced if seq.constraint is not None and not chunk.is_ahead else ()
        return ChunkResult((forced[0] if forced else choose(chunk),))

    def check_hidden_states(self, chunk: Chunk) -> None:
        """Checks that a request for a vector computes all hidden states that the vector needs. The cache has none."""
        seq, length = chunk.sequence, chunk.sequence.num_prompt
        if seq.kind == "generate":
            return
        computed = self.computed.setdefault(seq, set())
        if seq.request.pooling == "mean":
            assert chunk.start in (0, len(computed)), "a token is missing or counts twice"
            if chunk.start == 0:
                computed.clear()
        computed.update(range(chunk.start, chunk.end))
        if chunk.end == length:
            first = 0 if seq.request.pooling == "mean" else length - max(1, len(seq.request.targets))
            assert computed >= set(range(first, length))
            self.num_vectors += 1

    def pools(self) -> list[BlockPool]:
        """Returns all pools of pages, slots and places."""
        cache = self.scheduler.cache
        return [cache.pages, *(pool for pool in vars(cache.store).values() if isinstance(pool, BlockPool))]

    def check_integrity(self) -> None:
        cache, running = self.scheduler.cache, self.scheduler.running
        owned = [b for seq in running for b in seq.block_ids]
        for i in range(1, len(cache.pages.refs)):
            assert cache.pages.refs[i] == owned.count(i), f"page {i} has {cache.pages.refs[i]} references"
        slots = [seq.state_id for seq in running]
        for i in range(1, len(cache.slots.refs)):
            assert cache.slots.refs[i] == slots.count(i), f"slot {i} has {cache.slots.refs[i]} references"
        for page in cache.chains:
            assert cache.pages.lookup(page) is not None, "a protected page is not there"
        for pool in self.pools():
            assert pool.num_free == sum(r == 0 for r in pool.refs[1:]), "a unit leaked"


def make_scheduler(
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 200,
    caching: bool = True,
    num_slots: int = 16,
    num_compressed: int = 0,
    store: StateStore | None = None,
    num_stages: int = 1,
    **sizes: int,
) -> Scheduler:
    """Returns a scheduler with a cache. `sizes` are further arguments of `CacheManager`, and the scheduler's
    `max_num_mixed_tokens` if it is not `max_num_batched_tokens`."""
    mixed = sizes.pop("max_num_mixed_tokens", max_num_batched_tokens)
    defaults = {"num_pages": 64, "block_size": 4, "interval": 1024}
    if store is None:
        store = CompressedStates(num_slots, num_compressed) if num_compressed else SlotStates(num_slots)
    cache = CacheManager(store, **defaults | sizes, enabled=caching, policy=None)
    return Scheduler(
        cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_mixed_tokens=mixed,
        max_model_len=max_model_len,
        eos_token_ids=(),
        num_stages=num_stages,
    )


THINKING_END = (6, 7, 8, 7, 9)  # no prompt has these tokens


def random_request(random: Random, number: int, stems: list[list[int]], max_len: int) -> Request:
    stem = random.choice(stems)
    prompt = stem[: random.randint(1, max_len - 3)] + [random.randrange(5) for _ in range(random.randint(0, 3))]
    prompt = prompt[: max_len - 2]
    if random.random() < 0.15:
        return random_vector_request(random, number, prompt)
    return Request(
        id=f"r{number}",
        prompt=prompt,
        params=SamplingParams(
            max_tokens=random.randint(0, max_len - len(prompt)),
            prompt_logprobs=0 if random.random() < 0.1 else None,
            presence_penalty=1.0 if random.random() < 0.03 else 0.0,
            seed=number,
            thinking_token_budget=random.randint(0, 9) if random.random() < 0.2 else None,
            thinking_end=THINKING_END[: random.randint(1, 5)],
            logprobs=0 if random.random() < 0.2 else None,
        ),
        group=f"g{number // 3}" if random.random() < 0.2 else "",
        priority=random.choice((0, 0, 1, BACKGROUND_PRIORITY)),
        save_positions=tuple(random.randint(1, len(prompt)) for _ in range(random.randint(0, 2))),
        cache_salt=random.choice(("", "", "", "tenant")),
        cache=CacheUse(
            read=random.random() < 0.9,
            write=random.random() < 0.9,
            pin_seconds=float(random.random() < 0.2),
            explain=random.random() < 0.2,
        ),
    )


def random_vector_request(random: Random, number: int, prompt: list[int]) -> Request:
    num_targets = random.choice((0, 0, 1, random.randint(1, len(prompt))))
    return Request(
        id=f"r{number}",
        prompt=prompt,
        params=SamplingParams(max_tokens=0),
        kind="score" if num_targets else "embed",
        pooling="last" if num_targets else random.choice(("last", "mean")),
        targets=((0,),) * num_targets,
        priority=random.choice((0, 0, 0, 1)),
    )
