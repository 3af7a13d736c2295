"""StepPlan: the chunks of the next step and what is left of the step's budget, while the scheduler makes the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from jamba_server.engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """The plan of the next step while the scheduler makes this plan. The field `budget` is the number of prompt tokens
    that can still be added to the step. The dict `chunks` has (start, end, cost) for each sequence that is planned
    already. `cost` is the number of tokens that was subtracted from `budget` for the chunk.

    While other prompts wait, all prompts that need several steps may together add only `for_long` more tokens.
    `shortened` are the sequences that received fewer tokens for this reason.
    """

    budget: int
    for_long: int
    chunks: dict[Sequence, tuple[int, int, int]] = field(default_factory=dict[Sequence, tuple[int, int, int]])
    shortened: list[Sequence] = field(default_factory=list[Sequence])
    started: list[str] = field(default_factory=list[str])
    preempted: bool = False

    def add(self, seq: Sequence, end: int, cost: int) -> None:
        self.chunks[seq] = (seq.num_computed, end, cost)
        self.budget -= cost

    def drop(self, seq: Sequence) -> None:
        *_, cost = self.chunks.pop(seq, (0, 0, 0))
        self.budget += cost
