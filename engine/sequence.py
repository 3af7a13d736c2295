"""Sequence: one choice of one request while the engine works on it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from jamba_server.engine.types import Request, RequestKind, SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """One reply in the making. Chunked prefill, prefix hits, preemption and decode are one case: the sequence has
    `len(tokens)` tokens, and `num_computed` says how many of them have been launched so far.

    `order` is (priority, arrival number) and sorts sequences, smaller first. `block_ids` are the ids of its pages in
    order, `state_id` is the id of its slot (0 while it waits). `hashes[i]` is the chained hash of the prefix up to the
    end of page i. `branch` is the position where its tokens left a prefix that others had computed (0: none known).
    `tokens` and `block_ids` are arrays because each step copies them to tensors, which for a long context is 100 times
    faster than from a list.

    `num_pending` further tokens have been or will be sampled by steps in flight, and only the device knows them.
    Launched positions of steps in flight are not confirmed yet. `num_uncached` tokens were not in the cache when the
    sequence arrived, and `work_before` prompt tokens had been scheduled by then; both decide how urgent its prompt is.
    """

    request: Request
    order: tuple[int, int]
    submitted_at: float
    tokens: array[int]
    num_prompt: int
    num_computed: int = 0
    num_pending: int = 0
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

    @classmethod
    def of(cls, request: Request, *, arrival: int, now: float) -> Sequence:
        """Returns a sequence that waits. `now` is in seconds of the monotonic clock."""
        tokens = array("q", request.prompt)
        tokens.extend(request.generated)
        return cls(
            request=request,
            order=(request.priority, arrival),
            submitted_at=now,
            tokens=tokens,
            num_prompt=len(request.prompt),
            num_prompt_logprobs=request.num_prompt_logprobs,
        )

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def parent(self) -> str:
        """The id of the client's request that this sequence is a part of."""
        return self.request.parent or self.request.id

    @property
    def kind(self) -> RequestKind:
        return self.request.kind

    def vacate(self) -> None:
        """Forgets what the sequence owned. It starts again from whatever prefix the cache still has."""
        self.block_ids, self.state_id, self.num_computed, self.branch = array("i"), 0, 0, 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def counts_tokens(self) -> bool:
        """Whether what has been generated changes what comes next."""
        p = self.params
        penalises = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        return penalises or any(len(word) > 1 for word in p.bad_words)

    def samples_at(self, position: int) -> bool:
        """Whether a step that computes up to `position` chooses a token."""
        return position == len(self.tokens) + self.num_pending and self.request.params.max_tokens > 0

    @property
    def num_remaining(self) -> int:
        """Number of tokens whose states and KV must still be computed. It is at least 1 while no step is in flight."""
        return len(self.tokens) + self.num_pending - self.num_computed
