"""The class `Plan` holds the plan of the next step while the scheduler makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from jamba_server.engine.sequence import Sequence


@dataclass(slots=True)
class Plan:
    """The plan of the next step while the scheduler makes this plan. The field `budget` is the number of prompt tokens
    that can still be added to the step. The dict `chunks` has (start, end, cost) for each sequence that is planned
    already. `cost` is the number of tokens that was subtracted from `budget` for the chunk.

    While other prompts wait, all prompts that need several steps may together add only `for_long` more tokens.
    `shortened` are the sequences that received fewer tokens for this reason. `preempted` says that a sequence had to
    make room for another one of its kind, so that no sequence starts in the step. `no_background` says that no
    background sequence may start in the step, because one had to make room, or because another sequence waits for
    room. `admitted` says that a sequence was given pages and a slot, which copies may have to fill, even if it had to
    make room again.
    """

    budget: int
    for_long: int
    chunks: dict[Sequence, tuple[int, int, int]] = field(default_factory=dict[Sequence, tuple[int, int, int]])
    shortened: list[Sequence] = field(default_factory=list[Sequence])
    started: list[str] = field(default_factory=list[str])
    preempted: bool = False
    no_background: bool = False
    admitted: bool = False
    held: int = 0

    def add(self, seq: Sequence, end: int, cost: int) -> None:
        self.chunks[seq] = (seq.num_computed, end, cost)
        self.budget -= cost

    def drop(self, seq: Sequence) -> None:
        *_, cost = self.chunks.pop(seq, (0, 0, 0))
        self.budget += cost

    @property
    def has_prompts(self) -> bool:
        """Returns whether the step computes a part of a prompt, for whose first token a client waits."""
        return any(not seq.decodes or not seq.num_generated + seq.num_pending for seq in self.chunks)

    def hold_back(self, limit: int) -> None:
        """Reduces the budget to `limit` tokens. The rest is not used in this step."""
        self.held = max(0, self.budget - limit)
        self.budget -= self.held
