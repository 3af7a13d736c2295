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
        self._by_parent: dict[tuple[str, str], list[Sequence]] = {}
        for seq in running:
            self._by_tenant.setdefault(seq.request.tenant, []).append(seq)
            self._by_parent.setdefault((seq.request.tenant, seq.parent), []).append(seq)

    @property
    def one_holds_several(self) -> bool:
        """Whether a request has more than one sequence running."""
        return any(len(choices) > 1 for choices in self._by_parent.values())

    def turn(self, seq: Sequence) -> tuple[int, int, int, int, int]:
        """Sorts waiting sequences by whose turn it is: within a priority the tenant, then the request that has the
        fewest sequences running."""
        priority, rank, arrival = urgency(seq)
        tenant = seq.request.tenant
        of_tenant, of_parent = self._by_tenant.get(tenant, ()), self._by_parent.get((tenant, seq.parent), ())
        return priority, len(of_tenant), len(of_parent), rank, arrival

    def holder_for(self, seq: Sequence) -> Sequence | None:
        """The running sequence that gives way to `seq`: the youngest of whoever holds the most, if it holds several.

        A tenant without a running sequence takes the place of another tenant's, a request without one that of another
        request of its tenant. So no two sequences can displace each other in turn. A more urgent priority never gives
        way.
        """
        tenant = seq.request.tenant
        if tenant not in self._by_tenant:
            holders = list(self._by_tenant.values())
        elif (tenant, seq.parent) not in self._by_parent:
            holders = [choices for (owner, _), choices in self._by_parent.items() if owner == tenant]
        else:
            return None
        most = max(holders, key=len, default=())
        if len(most) < 2:
            return None
        youngest = max(most, key=lambda s: s.order)
        return youngest if youngest.order[0] >= seq.order[0] else None
