"""The class `Plan` holds the plan of the next step while the scheduler makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jamba_server.engine.fairness import RESERVED_PART
from jamba_server.engine.sequence import Sequence


class PlannedChunk(NamedTuple):
    """The tokens [start, end) of a sequence. They count as `cost` prompt tokens. `is_last` says that the sequence then
    has no more tokens to compute, so that the step samples a token or finishes a request for a vector."""

    start: int
    end: int
    cost: int
    is_last: bool


@dataclass(slots=True)
class Plan:
    """The plan of the next step while the scheduler makes this plan.

    The step computes at most `most` prompt tokens, and nothing is added beyond `mixed` prompt tokens once the step
    computes the end of a prompt, because a client then waits for this step. If replies are in the step, `most` equals
    `mixed`.

    While other prompts wait, all prompts that need several steps may together add only `for_long` more tokens.
    `shortened` has the sequences whose tokens `for_long` may have limited. `preempted` says that a sequence had to make
    room for another one of its kind (background or not); then no sequence starts in the step. `no_background` says
    that no background sequence may start in the step, because a sequence had to make room or waits for room.
    `admitted` says that a sequence was given pages and a slot, even if it had to make room again. Copies of the cache
    may have to fill them.
    """

    most: int
    mixed: int
    for_long: int = field(init=False)
    used: int = 0  # the number of prompt tokens in `chunks`
    chunks: dict[Sequence, PlannedChunk] = field(default_factory=dict[Sequence, PlannedChunk])
    shortened: list[Sequence] = field(default_factory=list[Sequence])
    started: list[str] = field(default_factory=list[str])
    preempted: bool = False
    no_background: bool = False
    admitted: bool = False
    _num_last: int = 0  # how many of the `chunks` have `is_last`

    def __post_init__(self) -> None:
        self.for_long = self.most - self.most // RESERVED_PART

    @property
    def budget(self) -> int:
        """Returns how many prompt tokens can still be added to the step."""
        return max(0, (self.mixed if self._num_last else self.most) - self.used)

    def add(self, seq: Sequence, end: int, cost: int) -> None:
        is_last = end - seq.num_computed == seq.num_remaining
        self.chunks[seq] = PlannedChunk(seq.num_computed, end, cost, is_last)
        self.used += cost
        self._num_last += is_last

    def drop(self, seq: Sequence) -> None:
        if (chunk := self.chunks.pop(seq, None)) is not None:
            self.used -= chunk.cost
            self._num_last -= chunk.is_last

    @property
    def has_prompts(self) -> bool:
        """Returns whether the step computes a part of a prompt, for whose first token a client waits."""
        return any(not seq.decodes or not seq.num_generated + seq.num_pending for seq in self.chunks)

    def hold_back(self, limit: int) -> None:
        """Lets at most `limit` more prompt tokens be added to the step."""
        self.most = self.mixed = self.used + min(limit, self.budget)
