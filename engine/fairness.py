"""Fairness: whose prompt comes first, and who makes room for whom. Pure functions of the sequences, without a clock.

Prompts in progress and new ones share the token budget of a step. The prompt with the least left to compute comes first
(shortest remaining time first), so that a short prompt need not wait for a long one. Every prompt ages, so that none
starves: its lead over later arrivals grows with the prompt tokens that the engine has computed since it came.
"""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.engine.sequence import Sequence

# A prompt of L tokens is overtaken by prompts that come before the engine has computed AGEING * L more prompt tokens.
AGEING = 8
RESERVED_PART = 4  # a quarter of a step's prompt tokens is kept for others while a long prompt runs
MAX_LONG_PREFILLS = 2  # prompts longer than a step that run at once; each holds the pages of what it has computed


def tokens_left(seq: Sequence) -> int:
    """Tokens that `seq` has yet to compute before its next token is known; of a waiting one what the cache lacked."""
    return seq.num_remaining if seq.state_id else seq.num_uncached


def urgency(seq: Sequence) -> tuple[int, int, int]:
    """Sorts prompts, the most urgent first. Age counts within a priority: background work never passes live work."""
    priority, arrival = seq.order
    return priority, AGEING * tokens_left(seq) + seq.work_before, arrival


class Shares:
    """Who runs: the sequences of each tenant (API key) and of each request."""

    def __init__(self, running: Iterable[Sequence]) -> None:
        self._by_tenant: dict[str, list[Sequence]] = {}
        self._by_parent: dict[str, list[Sequence]] = {}
        for seq in running:
            self._by_tenant.setdefault(seq.request.tenant, []).append(seq)
            self._by_parent.setdefault(seq.parent, []).append(seq)

    @property
    def one_holds_several(self) -> bool:
        """Whether a request has more than one sequence running."""
        return any(len(choices) > 1 for choices in self._by_parent.values())

    def turn(self, seq: Sequence) -> tuple[int, int, int, int, int]:
        """Sorts waiting sequences by whose turn it is: within a priority the tenant, then the request that has the
        fewest sequences running."""
        priority, rank, arrival = urgency(seq)
        tenant, parent = self._by_tenant.get(seq.request.tenant, ()), self._by_parent.get(seq.parent, ())
        return priority, len(tenant), len(parent), rank, arrival

    def holder_for(self, seq: Sequence) -> Sequence | None:
        """The running sequence that gives way to `seq`, the first of its tenant or of its request: the youngest of
        whoever holds the most, if that is more than one. A more urgent priority never gives way."""
        if seq.request.tenant not in self._by_tenant:
            holders = self._by_tenant.values()
        elif seq.parent not in self._by_parent:
            holders = self._by_parent.values()
        else:
            return None
        most = max(holders, key=len, default=())
        if len(most) < 2:
            return None
        youngest = max(most, key=lambda s: s.order)
        return youngest if youngest.order[0] >= seq.order[0] else None
