"""Sequence: one choice of one request while the engine works on it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from jamba_server.engine.types import Request, RequestKind, SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """`num_computed` chases `len(tokens)`: chunked prefill, prefix hits, preemption and decode are one case.

    `order` sorts sequences: (priority, arrival number), smaller first. `block_ids` are its pages in order,
    `state_id` its slot (0 while it waits). `hashes[i]` is the chained hash of the prefix up to block i's end.
    `branch` is a position where its tokens left what others had computed (0: none known). `tokens` and `block_ids` are
    arrays because each step copies them to tensors: of a long context that is 100 times faster than from a list.
    `num_pending` tokens after them have been chosen on the device, or will be by steps under way; what they are is not
    known yet. `num_computed` positions have been launched: those of steps under way are not confirmed. `num_uncached`
    tokens were not in the cache when it came, `work_before` prompt tokens had been scheduled by then.
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
        """`now`: seconds on the monotonic clock."""
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
        """The client's request, of which this is one choice."""
        return self.request.parent or self.request.id

    @property
    def kind(self) -> RequestKind:
        return self.request.kind

    def vacate(self) -> None:
        """It owns nothing any more, and begins again wherever the cache lets it."""
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
        """Tokens whose states and KV are still to be computed. While no step is under way, at least one."""
        return len(self.tokens) + self.num_pending - self.num_computed
