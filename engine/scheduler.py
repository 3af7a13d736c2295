"""Scheduler: who runs how many tokens in the next step. Plain Python, no tensors.

There is no prefill phase and no decode phase: every sequence has `num_computed`, which chases `len(tokens)`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jamba_server.engine.cache.manager import CacheCopies, CacheManager, PrefixHit, Save
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import EngineStats, FinishReason, Request, TokenLogprob, TokenUpdate


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of `sequence` run in this step; `saves` lie in (start, end], ascending. `samples`: it reaches
    the last token, and the next one is chosen."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    saves: tuple[Save, ...] = ()

    @property
    def is_ahead(self) -> bool:
        """Whether its token is known on the device only, until the step that chooses it is taken in."""
        return self.end > len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        """One token upon an existing state, which the decode kernels take."""
        return self.end - self.start == 1 and self.start > 0 and not self.saves


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: decodes first, each group in the order of `Sequence.order`; `copies` run before everything else."""

    chunks: tuple[Chunk, ...]
    copies: CacheCopies
    started: tuple[str, ...]


class ChunkResult(NamedTuple):
    """What the model said of one chunk: the sampled token, if the chunk samples, and log-probabilities."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(slots=True)
class _Plan:
    """The chunks of a step in the making, each with what it costs of the `budget` that is left."""

    budget: int
    chunks: dict[Sequence, tuple[int, int, int]] = field(default_factory=dict[Sequence, tuple[int, int, int]])
    preempted: bool = False

    def add(self, seq: Sequence, end: int, cost: int) -> None:
        self.chunks[seq] = (seq.num_computed, end, cost)
        self.budget -= cost

    def drop(self, seq: Sequence) -> None:
        *_, cost = self.chunks.pop(seq, (0, 0, 0))
        self.budget += cost


class Scheduler:
    """Owns the sequences; the cache manager owns what they occupy."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.cache = cache
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len, self.eos_token_ids = max_model_len, frozenset(eos_token_ids)
        self.waiting: list[Sequence] = []  # both sorted by Sequence.order
        self.running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0
        self._counters = dict.fromkeys(("preemptions", "queries", "hits", "no_state", "evicted", "steps"), 0)

    # In and out -------------------------------------------------------------------------------------------------

    def add(self, requests: Iterable[Request], *, now: float) -> None:
        """Queues requests in the order of their priority, then of their arrival. `now`: monotonic seconds."""
        for request in requests:
            assert request.id not in self._by_id, f"request {request.id} is here already"
            assert 0 < len(request.prompt) + len(request.generated) <= self.max_model_len, "prompt was not validated"
            self._arrivals += 1
            seq = Sequence.of(request, arrival=self._arrivals, now=now)
            self._by_id[request.id] = seq
            insort(self.waiting, seq, key=lambda s: s.order)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests wherever they are; unknown ids have ended already."""
        for request_id in request_ids:
            if (seq := self._by_id.get(request_id)) is not None:
                self._remove(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def stats(self) -> EngineStats:
        pages, slots, count = self.cache.pages, self.cache.slots, self._counters
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_blocks_used=pages.capacity - pages.num_free,
            kv_blocks_capacity=pages.capacity,
            state_slots_used=slots.capacity - slots.num_free,
            state_slots_capacity=slots.capacity,
            saved_states=self.cache.states.num_cached,
            num_preemptions_total=count["preemptions"],
            prefix_queries_total=count["queries"],
            prefix_hits_total=count["hits"],
            missed_no_state_total=count["no_state"],
            missed_evicted_total=count["evicted"],
            num_steps_total=count["steps"],
        )

    # Before the step --------------------------------------------------------------------------------------------

    def schedule(self, *, now: float) -> SchedulerOutput:
        """Decodes first, so that long prompts never stall replies; then prompts under way, then new sequences.

        Decodes cost nothing of the budget: prompts of just its length take a step each, not a step and a little more.
        """
        plan = _Plan(self.max_num_batched_tokens)
        for seq in sorted(self.running, key=lambda s: s.num_remaining > 1):
            if seq.state_id and (plan.budget or seq.num_remaining == 1):  # an earlier one may have preempted it
                self._extend(seq, plan)
        started = self._admit(plan, now) if not plan.preempted else ()
        chunks = [
            Chunk(seq, start, end, seq.samples_at(end), tuple(self.cache.plan_saves(seq, start, end)))
            for seq, (start, end, _) in plan.chunks.items()
        ]
        chunks.sort(key=lambda c: (not c.is_decode, c.sequence.order))
        self._counters["steps"] += bool(chunks)
        copies = self.cache.take_copies() if chunks else CacheCopies()  # without a step they wait for the next
        return SchedulerOutput(tuple(chunks), copies, started)

    def must_wait(self) -> bool:
        """Whether the next step cannot be scheduled before the tokens of the last one are known: a sequence's
        penalties or bad words look at them, or a state would be saved after one, under a key made of it."""
        return any(s.num_pending and (s.counts_tokens or self.cache.saves_after(len(s.tokens))) for s in self.running)

    def _extend(self, seq: Sequence, plan: _Plan) -> None:
        """Plans the next tokens of a running sequence; where pages are short the youngest one waits again."""
        remaining = seq.num_remaining
        if not remaining or (seq.num_pending and self._is_full(seq, len(seq.tokens) + seq.num_pending)):
            return  # a step under way brings its end
        size = min(remaining, max(plan.budget, 1))
        end = seq.num_computed + size
        while not self.cache.grow(seq, end):
            victim = self.running[-1]
            plan.drop(victim)
            plan.preempted = True
            self._preempt(victim)
            if victim is seq:
                return
        plan.add(seq, end, cost=size if remaining > 1 else 0)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.cache.free(seq)  # its state stays as a checkpoint: it resumes there if its pages survive
        insort(self.waiting, seq, key=lambda s: s.order)
        self._counters["preemptions"] += 1

    def _admit(self, plan: _Plan, now: float) -> tuple[str, ...]:
        """Moves sequences from waiting to running while slots, pages and budget last; the ids of those new here."""
        started: list[str] = []
        for seq in list(self.waiting):
            if not plan.budget or len(self.running) >= self.max_num_seqs:
                break
            if self._awaits_sibling(seq):
                continue
            hit = PrefixHit() if seq.params.prompt_logprobs is not None else self.cache.match(seq)
            if (end := self._occupy(seq, hit, plan.budget)) is None:
                break
            self.waiting.remove(seq)
            insort(self.running, seq, key=lambda s: s.order)
            if seq.queue_seconds is None:
                seq.queue_seconds, seq.num_cached = now - seq.submitted_at, min(seq.num_computed, seq.num_prompt)
                self._count_hit(seq, hit)
                started.append(seq.request.id)
            plan.add(seq, end, cost=end - seq.num_computed)
        return tuple(started)

    def _awaits_sibling(self, seq: Sequence) -> bool:
        """Whether another choice is computing full blocks of the prompt, which `seq` will find in the cache."""
        group, size = seq.request.group, self.cache.block_size
        if not group or not self.cache.enabled or seq.params.prompt_logprobs is not None:
            return False
        end = (seq.num_prompt - 1) // size * size
        return any(s.request.group == group and s.num_computed < end for s in self.running)

    def _occupy(self, seq: Sequence, hit: PrefixHit, budget: int) -> int | None:
        """Gives `seq` room for its first chunk and returns the chunk's end, or None. A page per running sequence is
        kept free, so that an admission does not cause a preemption at once; a preempted one waits until all of its
        tokens fit, or it would be preempted at the same place again and again."""
        end, size = min(len(seq.tokens), hit.num_tokens + budget), self.cache.block_size
        later = 0 if seq.queue_seconds is None else -(-len(seq.tokens) // size) - -(-end // size)
        if self.cache.admit(seq, hit, end, reserve=len(self.running) + later):
            return end
        assert self.running, "the memory plan has room for one sequence of any length"
        return None

    def _count_hit(self, seq: Sequence, hit: PrefixHit) -> None:
        if seq.params.prompt_logprobs is not None or not self.cache.enabled:
            return
        self._counters["queries"] += seq.num_prompt
        self._counters["hits"] += seq.num_cached
        left = seq.num_prompt - seq.num_cached  # a replayed request may have missed generated tokens too
        no_state = min(hit.missed_no_state, left)
        self._counters["no_state"] += no_state
        self._counters["evicted"] += min(hit.missed_evicted, left - no_state)

    # After the step ---------------------------------------------------------------------------------------------

    def advance(self, output: SchedulerOutput) -> None:
        """The step is under way: whatever is launched from now on finds its pages and states written."""
        for chunk in output.chunks:
            seq = chunk.sequence
            seq.num_pending += chunk.samples
            seq.num_computed = chunk.end
        self.cache.commit(output.copies)

    def update(self, output: SchedulerOutput, results: Iterable[ChunkResult]) -> list[TokenUpdate]:
        """Takes in what the model said; finished sequences give back what they own. Steps come in their order, each
        after its `advance`; a token of a sequence that has ended meanwhile is dropped."""
        updates: list[TokenUpdate] = []
        for chunk, result in zip(output.chunks, results, strict=True):
            seq = chunk.sequence
            if self._by_id.get(seq.request.id) is not seq:
                continue
            seq.num_prompt_logprobs += len(result.prompt_logprobs)
            reason: FinishReason | None = None
            if chunk.end == len(seq.tokens):
                reason = self._take(seq, result.token_id)
            if result.token_id is not None or result.prompt_logprobs or reason:
                updates.append(self._report(seq, result, reason))
            if reason:
                self._remove(seq)
        return updates

    def _take(self, seq: Sequence, token_id: int | None) -> FinishReason | None:
        """Appends a sampled token and says whether and why the sequence ends with it."""
        if token_id is None:
            return "length"  # max_tokens 0: only the prompt was wanted
        seq.tokens.append(token_id)
        seq.num_pending -= 1
        if self._stops(seq, token_id):
            return "stop"
        return "length" if self._is_full(seq, len(seq.tokens)) else None

    def _is_full(self, seq: Sequence, length: int) -> bool:
        """Whether so many tokens are all that it may have."""
        return length - seq.num_prompt >= seq.params.max_tokens or length >= self.max_model_len

    def _stops(self, seq: Sequence, token_id: int) -> bool:
        if seq.num_generated < seq.params.min_tokens:
            return False
        return token_id in seq.params.stop_token_ids or (token_id in self.eos_token_ids and not seq.params.ignore_eos)

    def _report(self, seq: Sequence, result: ChunkResult, reason: FinishReason | None) -> TokenUpdate:
        first, seq.announced = not seq.announced, True
        return TokenUpdate(
            request_id=seq.request.id,
            token_ids=[] if result.token_id is None else [result.token_id],
            logprobs=[] if result.logprob is None else [result.logprob],
            prompt_logprobs=list(result.prompt_logprobs),
            finish_reason=reason,
            stop_token_id=result.token_id if reason == "stop" else None,
            num_cached=seq.num_cached if first else None,
            queue_seconds=seq.queue_seconds if first else None,
        )

    def _remove(self, seq: Sequence) -> None:
        del self._by_id[seq.request.id]
        if seq.state_id:
            self.running.remove(seq)
            self.cache.free(seq)
        else:
            self.waiting.remove(seq)
