"""Sequence: a prompt with one reply that the engine is generating."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.types import CacheReport, CacheTier, Request, RequestKind, SamplingParams


class RestoredPrefix(NamedTuple):
    """The first `end` tokens of a sequence were brought to the device from `tier`. `seconds` is the time of reading
    them, and of writing them to the device."""

    tier: CacheTier
    end: int
    seconds: float


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A prompt and the reply that is being generated. The sequence has `len(tokens)` tokens. The first `num_computed`
    of these tokens need no further computation: they were found in the cache, or a launched step computes them. The
    scheduler needs only `len(tokens)` and `num_computed` to plan prefill, prefix hits, preemption and decode.

    `order` is (priority, arrival number) and sorts sequences, smaller first. `block_ids` are the ids of the sequence's
    pages in order, and `state_id` is the id of its state slot (0 while the sequence waits). `hashes[i]` is the chained
    hash of the prefix up to the end of page i. `branch` is the position where this sequence's tokens begin to differ
    from a prefix that other sequences have computed (0: no such position is known). `tokens` and `block_ids` are arrays
    because each step copies them to tensors, which for a long context is 100 times faster than from a list.

    Steps in flight sample `num_pending` further tokens, whose values are known only on the device. The results of steps
    in flight are not confirmed yet; `num_in_flight` of these steps have tokens of this sequence. `num_uncached` tokens
    were not in the cache when the sequence arrived, and `work_before` prompt tokens had been scheduled by then; both
    numbers decide how urgent the prompt is.

    While the prompt is computed, states are also saved at the positions `junctions`, because other sequences wait for
    them (`engine.joining`). `has_waited` says whether this sequence has waited for another one; it gives up waiting
    when more than `waits_until` prompt tokens have been scheduled. `report` explains what the cache had for the prompt.

    `constraint` applies the grammar or the limit on reasoning tokens, or is None if the request has neither. The last
    `num_forced` tokens were not sampled, because the constraint allowed only these tokens. The first `num_reported`
    tokens are the prompt and those reply tokens that updates have already reported to the HTTP process.

    A sequence that is `restoring` waits until its prefix has been read from a disk. `num_restores` counts the attempts
    to bring its prefix back to the device since it last ran, and `restored` is the last attempt that succeeded.
    """

    request: Request
    order: tuple[int, int]
    submitted_at: float
    tokens: array[int]
    num_prompt: int
    num_computed: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    state_id: int = 0
    branch: int = 0
    hashes: list[bytes] = field(default_factory=list[bytes])
    num_prompt_logprobs: int = 0
    num_cached: int = 0
    queue_seconds: float | None = None
    announced: bool = False
    num_uncached: int = 0
    work_before: int = 0
    junctions: list[int] = field(default_factory=list[int])
    has_waited: bool = False
    waits_until: int = 0
    report: CacheReport | None = None
    constraint: Constraint | None = None
    num_forced: int = 0
    num_reported: int = 0
    restoring: bool = False
    num_restores: int = 0
    restored: RestoredPrefix | None = None
    is_background: bool = field(init=False)  # a copy of the request's property, which every step reads

    def __post_init__(self) -> None:
        self.is_background = self.request.is_background

    @classmethod
    def of(cls, request: Request, *, arrival: int, now: float, constraint: Constraint | None = None) -> Sequence:
        """Returns a new sequence, which waits to be scheduled. `now` is the time of the monotonic clock in seconds. A
        request with a grammar needs a `constraint` that has been advanced over the tokens which the request has already
        generated."""
        if constraint is None:
            assert not request.params.grammar, "the grammar was not compiled"
            if (constraint := Constraint.without_grammar(request.params)) is not None:
                constraint.take_all(request.generated)
        tokens = array("q", request.prompt)
        tokens.extend(request.generated)
        return cls(
            request=request,
            order=(request.priority, arrival),
            submitted_at=now,
            tokens=tokens,
            num_prompt=len(request.prompt),
            num_prompt_logprobs=request.num_prompt_logprobs,
            constraint=constraint,
            num_reported=len(tokens),
        )

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def parent(self) -> str:
        """The id of the client's request for which this sequence generates one of the replies."""
        return self.request.parent or self.request.id

    @property
    def kind(self) -> RequestKind:
        return self.request.kind

    @property
    def reads_cache(self) -> bool:
        """Returns whether a cached prefix need not be computed again. A request may ask not to read the cache. If it
        asks for log-probabilities of the prompt, or for a mean, it needs the hidden states of all tokens, which the
        cache does not have."""
        return self.request.cache.read and self.params.prompt_logprobs is None and self.request.pooling != "mean"

    @property
    def num_reusable(self) -> int:
        """Returns how many of the first tokens need not be computed if they are found in the cache. The hidden state of
        the last token is always needed, and so are those of the positions that the request scores."""
        return len(self.tokens) - max(1, len(self.request.targets)) if self.reads_cache else 0

    def vacate(self) -> None:
        """Resets the fields that name the sequence's pages and state slot. This method does not free the pages or the
        slot. When the sequence is admitted again, the computation continues after the prefix of the sequence that is
        then in the cache."""
        self.block_ids, self.state_id, self.num_computed, self.branch = array("i"), 0, 0, 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def counts_tokens(self) -> bool:
        """Returns whether the choice of the next token depends on the values of earlier reply tokens, because of
        penalties, bad words, a grammar or a limit on reasoning tokens."""
        p = self.params
        if self.constraint is not None and self.constraint.waits(self.num_generated + self.num_pending):
            return True
        penalises = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        return penalises or any(len(word) > 1 for word in p.bad_words)

    @property
    def decodes(self) -> bool:
        """Returns whether the sequence is in its decode phase: the only tokens that must still be computed are the
        token that was sampled last and tokens that a grammar has forced after it."""
        return 0 < self.num_remaining <= 1 + self.num_forced

    def samples_at(self, position: int) -> bool:
        """Returns whether a step that computes the tokens before `position` samples the token at `position`."""
        return position == len(self.tokens) + self.num_pending and self.request.params.max_tokens > 0

    @property
    def num_remaining(self) -> int:
        """Number of tokens whose states, keys and values must still be computed. This number is at least 1 while no
        step is in flight."""
        return len(self.tokens) + self.num_pending - self.num_computed
