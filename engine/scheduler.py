"""The scheduler decides which sequences run in the next step, and how many tokens of each sequence are computed. This
module uses no tensors.

Prefill and decode are not separate phases. A sequence has `len(tokens)` tokens, of which the first `num_computed` have
been computed or are in flight, and each step computes some of the remaining ones. `engine/fairness.py` decides which
prompt is computed first, and which running sequence makes room for a waiting one.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from jamba_server.engine.cache.explain import PrefixCounts, Salts, explain
from jamba_server.engine.cache.manager import CacheCopies, CacheManager, PrefixHit, Save
from jamba_server.engine.fairness import BACKGROUND_PART, MAX_LONG_PREFILLS, Shares, tokens_left, urgency
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.joining import Joining
from jamba_server.engine.microbatches import Microbatches
from jamba_server.engine.plan import Plan
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import EngineStats, FinishReason, Request, TokenLogprob, TokenUpdate
from jamba_server.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens [start, end) of one sequence, which run in one step.

    A token is sampled after each of the last `num_sampled` positions: 0 before the end of the prompt, 1 for the next
    token, and all positions to verify speculative tokens. The positions of `saves` are in (start, end], ascending.
    """

    sequence: Sequence
    start: int
    end: int
    num_sampled: int
    saves: tuple[Save, ...] = ()

    @property
    def is_ahead(self) -> bool:
        """Returns whether only the device knows the chunk's last token, because the host has not read the results of
        the step that sampled this token."""
        return self.end > len(self.sequence.tokens)

    @property
    def is_decode(self) -> bool:
        """Returns whether the decode kernels can run the chunk: it has one token, which is not the first of its
        sequence, and it saves no state."""
        return self.end - self.start == 1 and self.start > 0 and not self.saves


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The work of one step. Chunks that decode come before all other chunks. Within each of these two groups, the
    chunks are sorted by `Sequence.order`.

    `copies` of the cache run before the chunks. There may be copies without chunks, if the sequences for which they are
    had to make room again. `started` has the ids of requests that run for the first time.
    """

    chunks: tuple[Chunk, ...]
    copies: CacheCopies
    started: tuple[str, ...]


class ChunkResult(NamedTuple):
    """The model's results for one chunk: the sampled tokens and, if the request asks for them, log-probabilities of
    sampled tokens and of prompt tokens. `vector` comes with the last chunk of a request for a vector."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    vector: bytes | None = None


class Scheduler:
    """Owns the waiting and running sequences. The cache manager owns the pages and state slots that these sequences
    use."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_mixed_tokens: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        num_stages: int = 1,
    ) -> None:
        self.cache, self._microbatches = cache, Microbatches(num_stages)
        self.max_num_batched_tokens, self.max_num_mixed_tokens = max_num_batched_tokens, max_num_mixed_tokens
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting = WaitingQueue(max_short=max_num_mixed_tokens)
        # The running sequences are sorted by priority and then by arrival (`Sequence.order`).
        self.running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0
        self._tenants: Counter[str] = Counter()  # counts the running and waiting sequences of each tenant
        self._work = 0  # counts the prompt tokens that were ever scheduled; prompts age by this number, not by a clock
        self._num_preemptions = self._num_steps = 0
        self._prefixes, self._salts = PrefixCounts(), Salts()
        self.joining = Joining(cache, max_num_batched_tokens)

    # Adding and aborting requests -------------------------------------------------------------------------------

    def add(
        self, requests: Iterable[Request], *, now: float, constraints: Mapping[str, Constraint] = MappingProxyType({})
    ) -> None:
        """Puts requests into the queue, which is sorted by priority, and by arrival within a priority. `now` is the
        time of the monotonic clock in seconds. `constraints` maps the id of each request with a grammar to its compiled
        constraint."""
        for request in requests:
            assert request.id not in self._by_id, f"request {request.id} is here already"
            assert 0 < len(request.prompt) + len(request.generated) <= self.max_model_len, "prompt was not validated"
            self._arrivals += 1
            seq = Sequence.of(request, arrival=self._arrivals, now=now, constraint=constraints.get(request.id))
            self._append_forced(seq)
            if request.cache.write:
                self._salts.add(request.tenant, request.cache_salt)
            seq.work_before = self._work
            seq.num_uncached = len(seq.tokens) - self.cache.expect(seq)
            self._by_id[request.id] = seq
            self._tenants[request.tenant] += 1
            self.waiting.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Removes waiting and running requests. Ids of requests that have ended already are ignored."""
        for request_id in request_ids:
            if (seq := self._by_id.get(request_id)) is not None:
                self._remove(seq)

    def park(self) -> None:
        """Stops all running sequences and saves their states, so that an engine with the same disk tier finds them."""
        for seq in list(self.running):
            self._preempt(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def stats(self) -> EngineStats:
        pages, slots = self.cache.pages, self.cache.slots
        return EngineStats(
            num_running=len(self.running),
            num_waiting=self.waiting.number(background=False),
            num_background_running=sum(seq.is_background for seq in self.running),
            num_background_waiting=self.waiting.number(background=True),
            kv_blocks_used=pages.capacity - pages.num_free,
            kv_blocks_capacity=pages.capacity,
            state_slots_used=slots.capacity - slots.num_free,
            state_slots_capacity=slots.capacity,
            saved_states=self.cache.store.num_saved,
            pinned_blocks=pages.num_pinned,
            pinned_states=self.cache.store.saved.num_pinned,
            num_preemptions_total=self._num_preemptions,
            **self._prefixes.totals,
            num_steps_total=self._num_steps,
            tiers=self.cache.tier_stats,
        )

    # Planning a step --------------------------------------------------------------------------------------------

    def schedule(self, *, now: float) -> SchedulerOutput:
        """Plans the next step. `now`, the time of the monotonic clock in seconds, is only used to measure how long
        requests wait in the queue.

        Sequences that decode come first, so that a long prompt never stalls a reply. Prompts follow in the order of
        their urgency. Without replies, the most urgent prompt may take a larger step (`Plan.most`). A decoded token
        does not count against the token budget, so a prompt as long as the budget takes one step. Tokens that a grammar
        forces after a decoded token are computed in the same step and do count. Background sequences sit out a step
        that computes a prompt of another request.
        """
        mixed = self.max_num_mixed_tokens
        plan = Plan(mixed if any(seq.decodes for seq in self.running) else self.max_num_batched_tokens, mixed)
        self._fill(plan, now, background=False)
        has_background = self.waiting.number(background=True) or (self.running and self.running[-1].is_background)
        if has_background and not plan.has_prompts:
            if plan.chunks:
                plan.hold_back(mixed // BACKGROUND_PART)
            self._fill(plan, now, background=True)
        self._work += plan.used
        chunks = [
            Chunk(seq, start, end, int(seq.samples_at(end)), tuple(self.cache.plan_saves(seq, start, end)))
            for seq, (start, end, *_) in plan.chunks.items()
        ]
        chunks.sort(key=lambda c: (not c.is_decode, c.sequence.order))
        self._num_steps += bool(chunks)
        copies = self.cache.take_copies() if chunks or plan.admitted else CacheCopies()
        return SchedulerOutput(tuple(chunks), copies, tuple(plan.started))

    def _fill(self, plan: Plan, now: float, *, background: bool) -> None:
        """Plans chunks of all background sequences, or of all others."""
        for seq in self._microbatches.share([s for s in self.running if s.decodes and s.is_background == background]):
            if seq.state_id:  # the state id is 0 if this loop has preempted `seq` meanwhile
                self._extend(seq, plan, 1 + plan.budget)
        self._share_out(plan, now, background)

    def _share_out(self, plan: Plan, now: float, background: bool) -> None:
        """Divides the step's budget of prompt tokens among prompts in progress and new prompts. The most urgent prompt
        gets tokens first."""
        peers = [seq for seq in self.running if seq.is_background == background]
        prompts = sorted((seq for seq in peers if seq.num_remaining and not seq.decodes), key=urgency)
        newcomer = self._next_waiting(plan, background)
        while plan.budget and (prompts or newcomer):
            if newcomer is None or (prompts and urgency(prompts[0]) < urgency(newcomer)):
                seq = prompts.pop(0)
                if seq.state_id:  # the state id is 0 if this loop has preempted `seq` meanwhile
                    self._extend(seq, plan, self._part(seq, plan, others=bool(prompts or newcomer)))
                newcomer = None if plan.preempted else newcomer
            else:
                others = bool(prompts) or self.waiting.number(background) > 1
                admitted = self._admit(newcomer, plan, self._part(newcomer, plan, others=others), now)
                plan.no_background |= not admitted
                newcomer = self._next_waiting(plan, background) if admitted or newcomer.restoring else None
        # Some prompts got fewer tokens than they need, because a part of the budget was kept for others. They now get
        # what the others have left over. If another prompt ends in the step, this can be less than they got before.
        for seq in plan.shortened:
            if seq.state_id and seq in plan.chunks:
                plan.drop(seq)
                self._extend(seq, plan, plan.budget)

    def _part(self, seq: Sequence, plan: Plan, *, others: bool) -> int:
        """Returns how many prompt tokens of `seq` can be computed in this step. The argument `others` says whether
        other prompts could use tokens of the step's budget. If `others` is true and the prompt of `seq` needs several
        steps, some of the budget is left to the other prompts."""
        if not others or tokens_left(seq) <= plan.most:
            return plan.budget
        part = min(plan.budget, plan.for_long)
        plan.for_long -= part
        plan.shortened.append(seq)
        return part

    def must_wait(self) -> bool:
        """Returns whether the tokens that the most recently launched step samples must be read before the next step can
        be scheduled.

        They must be read first if penalties, bad words or the grammar of a sequence depend on these tokens. They must
        also be read if a state is to be saved after one of them, because the key of a saved state is computed from the
        tokens before it.
        """
        return any(s.num_pending and (s.counts_tokens or self.cache.saves_after(len(s.tokens))) for s in self.running)

    def _extend(self, seq: Sequence, plan: Plan, limit: int) -> None:
        """Plans up to `limit` more tokens of a running sequence. While too few pages are free, the youngest running
        sequence is preempted."""
        remaining = seq.num_remaining
        if not remaining or not limit or (seq.num_pending and self._is_full(seq, len(seq.tokens) + seq.num_pending)):
            return  # no tokens can be planned, or a launched step already samples the final token of the sequence
        size = min(remaining, limit)
        end = seq.num_computed + size
        while not self.cache.grow(seq, end):
            victim = self.running[-1]
            self._park(victim, plan)
            plan.preempted |= victim.is_background == seq.is_background
            if victim is seq:
                return
        plan.add(seq, end, cost=size - seq.decodes)

    def _park(self, seq: Sequence, plan: Plan) -> None:
        """Removes a running sequence from the planned step and puts it back into the queue."""
        plan.drop(seq)
        plan.no_background = True
        self._preempt(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.cache.free(seq)  # saves the state, too; `seq` resumes from this state if the pages of `seq` stay cached
        seq.num_restores = 0
        seq.num_uncached = 0  # 0 makes the sequence more urgent than a new prompt, because it has waited before
        self.waiting.add(seq)
        # Operators watch this number, because pages are short if it grows. Making room for others is normal in the
        # background.
        self._num_preemptions += not seq.is_background

    def _next_waiting(self, plan: Plan, background: bool) -> Sequence | None:
        """Returns the waiting sequence that should run next, or None if this step can admit no sequence. The result is
        a background sequence or another one, as the argument says.

        Tenants and requests take turns: within a priority, the tenant or request with the fewest running sequences
        comes first. If `max_num_seqs` sequences run, only a tenant or request without a running sequence can start one,
        and only if another tenant or request has several and can give up one of these. Slots of background sequences
        count as free for the others.
        """
        if plan.preempted or not plan.budget or not self.waiting.number(background):
            return None
        if background and plan.no_background:
            return None
        peers = [seq for seq in self.running if seq.is_background == background]
        taken = len(self.running) if background else len(peers)
        full, shares = taken >= self.max_num_seqs, Shares(peers)
        if full and not shares.one_holds_several and len(self._tenants) < 2:
            return None  # nothing can be displaced, which is the usual case under load; this early return saves time
        no_more_long = sum(tokens_left(s) > self.max_num_mixed_tokens for s in peers) >= MAX_LONG_PREFILLS
        return self.waiting.next(
            shares,
            full=full,
            with_long=not no_more_long,
            background=background,
            may_start=self.joining.gate(peers, self._work),
        )

    def _admit(self, seq: Sequence, plan: Plan, limit: int, now: float) -> bool:
        """Admits `seq` with a first chunk of up to `limit` tokens, or returns False and leaves `seq` in the queue.

        If too few slots or pages are free, background sequences make room for the others. Otherwise, a tenant or
        request with several running sequences gives up one of them to a tenant or request that has none.
        """
        if not limit or self.cache.seek(seq):
            return False
        hit, end, holder = self.cache.match(seq), None, None
        if len(self.running) < self.max_num_seqs:
            end = self._occupy(seq, hit, limit)
        while end is None:
            is_last = holder is not None and holder.is_background == seq.is_background
            if is_last or (holder := self._holder_for(seq)) is None:
                return False
            self._park(holder, plan)
            # `_park` has changed the contents of the cache, so the cached prefix is searched again.
            hit = self.cache.match(seq)
            end = self._occupy(seq, hit, limit)
        plan.admitted = True
        self.waiting.remove(seq)
        insort(self.running, seq, key=lambda s: s.order)
        if seq.queue_seconds is None:
            seq.queue_seconds, seq.num_cached = now - seq.submitted_at, min(seq.num_computed, seq.num_prompt)
            self._prefixes.add(self.cache, seq, hit)
            if seq.request.cache.explain:
                seq.report = explain(self.cache, seq, hit, self._salts)
            plan.started.append(seq.request.id)
        plan.add(seq, end, cost=end - seq.num_computed)
        return True

    def _holder_for(self, seq: Sequence) -> Sequence | None:
        """Returns the running sequence that must make room for the waiting sequence `seq`, or None if `seq` must wait.
        Background sequences are the last in the list of running sequences."""
        if not seq.is_background and self.running and self.running[-1].is_background:
            return self.running[-1]
        return Shares(s for s in self.running if s.is_background == seq.is_background).holder_for(seq)

    def _occupy(self, seq: Sequence, hit: PrefixHit, budget: int) -> int | None:
        """Allocates pages and a state slot for the first chunk of `seq`. Returns the chunk's end, or None if too few
        pages or slots are free.

        One page per running sequence stays free, so that an admission does not cause a preemption at once. A preempted
        sequence waits until all of its tokens fit. Otherwise it would be preempted at the same token again and again.
        """
        end, size = min(len(seq.tokens), hit.num_tokens + budget), self.cache.block_size
        later = 0 if seq.queue_seconds is None else -(-len(seq.tokens) // size) - -(-end // size)
        if self.cache.admit(seq, hit, end, reserve=len(self.running) + later):
            return end
        assert self.running, "the memory plan has room for one sequence of any length"
        return None

    # Recording a launched step and its results ------------------------------------------------------------------

    def advance(self, output: SchedulerOutput) -> None:
        """Records that a step was launched. Later steps run after this step, so they can read the pages and states that
        this step writes."""
        for chunk in output.chunks:
            seq = chunk.sequence
            seq.num_pending += chunk.num_sampled
            seq.num_computed = chunk.end
        self._microbatches.launch(chunk.sequence for chunk in output.chunks)
        self.cache.launch(output.copies)

    def update(self, output: SchedulerOutput, results: Iterable[ChunkResult]) -> list[TokenUpdate]:
        """Adds the results of a step to the step's sequences, removes finished sequences, and returns the updates for
        the requests.

        Steps must be updated in the order in which they were launched, each after the call of `advance` for that step.
        The results of a sequence that has ended in the meantime are dropped.
        """
        self.cache.confirm()
        self._microbatches.confirm(chunk.sequence for chunk in output.chunks)
        updates: list[TokenUpdate] = []
        for chunk, result in zip(output.chunks, results, strict=True):
            seq = chunk.sequence
            if self._by_id.get(seq.request.id) is not seq:
                continue
            seq.num_prompt_logprobs += len(result.prompt_logprobs)
            reason: FinishReason | None = None
            if chunk.end == (length := len(seq.tokens)):
                reason = self._take(seq, result.token_ids)
                # the step may have sampled tokens after the end of the sequence, which are dropped
                result = result._replace(logprobs=result.logprobs[: len(seq.tokens) - length])
                if reason is None:
                    self._append_forced(seq)
            if result.token_ids or result.prompt_logprobs or reason:
                updates.append(self._report(seq, result, reason, self.cache.pin(seq) if reason else None))
            if reason:
                self._remove(seq)
        return updates

    def discard(self) -> None:
        """Must be called after a failed step. Drops all requests that have begun, because the pages and states of these
        requests may be wrong.

        They end without an update. Requests that have not begun stay in the queue.
        """
        self.running = []
        waiting = [seq for seq in self.waiting if seq.queue_seconds is None]
        for seq in self.waiting:
            if seq.restoring and seq.queue_seconds is not None:
                self.cache.give_up(seq)
        self.waiting = WaitingQueue(max_short=self.max_num_mixed_tokens)
        self._by_id = {seq.request.id: seq for seq in waiting}
        self._tenants = Counter(seq.request.tenant for seq in waiting)
        for seq in waiting:
            seq.vacate()  # the failed step may have admitted the sequence already
            self.waiting.add(seq)
        self._microbatches.discard()
        self.cache.discard()

    def _take(self, seq: Sequence, token_ids: tuple[int, ...]) -> FinishReason | None:
        """Appends sampled tokens to the sequence, up to and including the first token that ends the sequence. Returns
        the finish reason, or None if the sequence goes on."""
        if not token_ids:
            return "length"  # the request has max_tokens 0: it asks only for the computation of the prompt
        for token_id in token_ids:
            if (constraint := seq.constraint) is not None:
                if not constraint.error:
                    constraint.take(token_id)
                if constraint.error:
                    return "error"
            seq.tokens.append(token_id)
            seq.num_pending -= 1
            if self._stops(seq, token_id):
                return "stop"
            if self._is_full(seq, len(seq.tokens)):
                return "length"
        return None

    def _append_forced(self, seq: Sequence) -> None:
        """Appends to `seq` the tokens that its grammar forces next. The next step computes all of them together and
        samples none of them. A token that ends the reply is not appended but sampled, so that every reply ends with a
        sampled token. If the request asks for log-probabilities, no token is appended, because every token must then be
        sampled."""
        seq.num_forced = 0
        if (constraint := seq.constraint) is None or seq.params.logprobs is not None:
            return
        while constraint.forced and not self._is_full(seq, len(seq.tokens) + 1):
            token_id = constraint.forced[0]
            if token_id in seq.params.stop_token_ids or token_id in self.eos_token_ids:
                return
            seq.tokens.append(token_id)
            constraint.take(token_id)
            seq.num_forced += 1

    def _is_full(self, seq: Sequence, length: int) -> bool:
        """Returns whether a sequence of `length` tokens has reached max_tokens or the maximum context length."""
        return length - seq.num_prompt >= seq.params.max_tokens or length >= self.max_model_len

    def _stops(self, seq: Sequence, token_id: int) -> bool:
        if seq.constraint is not None and seq.constraint.is_over:
            return True
        if seq.num_generated < seq.params.min_tokens:
            return False
        return token_id in seq.params.stop_token_ids or (token_id in self.eos_token_ids and not seq.params.ignore_eos)

    def _report(
        self, seq: Sequence, result: ChunkResult, reason: FinishReason | None, num_pinned: int | None
    ) -> TokenUpdate:
        first, seq.announced = not seq.announced, True
        token_ids = seq.tokens[seq.num_reported :].tolist()
        seq.num_reported = len(seq.tokens)
        return TokenUpdate(
            request_id=seq.request.id,
            token_ids=token_ids,
            logprobs=[*result.logprobs],
            prompt_logprobs=[*result.prompt_logprobs],
            finish_reason=reason,
            stop_token_id=token_ids[-1] if reason == "stop" else None,
            error=seq.constraint.error if reason == "error" and seq.constraint is not None else None,
            contradictory=reason == "error" and seq.constraint is not None and seq.constraint.contradictory,
            vector=result.vector,
            num_cached=seq.num_cached if first else None,
            queue_seconds=seq.queue_seconds if first else None,
            cache=seq.report if first else None,
            num_pinned=num_pinned,
        )

    def _remove(self, seq: Sequence) -> None:
        del self._by_id[seq.request.id]
        self._tenants -= Counter([seq.request.tenant])
        if seq.state_id:
            self.running.remove(seq)
            self.cache.free(seq)
        else:
            self.waiting.remove(seq)
            if seq.restoring:
                self.cache.give_up(seq)
