"""The rules of fairness: whose prompt comes first, and which sequence makes room for another. They read no clock.

Prompts in progress and new ones share the token budget of a step. The prompt with the fewest tokens left comes first
(shortest remaining time first), so that a short prompt need not wait for a long one. Prompts age, so that none starves:
a prompt's advantage over later arrivals grows with the number of prompt tokens that were scheduled since it arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.engine.sequence import Sequence

# A prompt of L tokens can be overtaken only by prompts that arrive before AGEING * L more prompt tokens are scheduled.
AGEING = 8
RESERVED_PART = 4  # while a long prompt runs, a quarter of a step's prompt tokens is kept for other prompts
MAX_LONG_PREFILLS = 2  # number of long prompts that run at once, because each occupies pages while it makes progress


def tokens_left(seq: Sequence) -> int:
    """Returns how many tokens of `seq` must be computed before its next token can be sampled. For a waiting sequence it
    is the number of tokens that were not in the cache when it arrived."""
    return seq.num_remaining if seq.state_id else seq.num_uncached


def urgency(seq: Sequence) -> tuple[int, int, int]:
    """Returns a key that sorts prompts by urgency. Ageing acts only within a priority, so background work never passes
    live work."""
    priority, arrival = seq.order
    return priority, AGEING * tokens_left(seq) + seq.work_before, arrival


class Shares:
    """The running sequences of each tenant (API key) and of each client request."""

    def __init__(self, running: Iterable[Sequence]) -> None:
        self._by_tenant: dict[str, list[Sequence]] = {}
        self._by_parent: dict[tuple[str, str], list[Sequence]] = {}
        for seq in running:
            self._by_tenant.setdefault(seq.request.tenant, []).append(seq)
            self._by_parent.setdefault((seq.request.tenant, seq.parent), []).append(seq)

    @property
    def one_holds_several(self) -> bool:
        """Returns whether some request has more than one running sequence."""
        return any(len(choices) > 1 for choices in self._by_parent.values())

    def turn(self, seq: Sequence) -> tuple[int, int, int, int, int]:
        """Returns a key that sorts waiting sequences by whose turn it is. Within a priority, the tenant with the fewest
        running sequences comes first, then the request with the fewest."""
        priority, rank, arrival = urgency(seq)
        tenant = seq.request.tenant
        of_tenant, of_parent = self._by_tenant.get(tenant, ()), self._by_parent.get((tenant, seq.parent), ())
        return priority, len(of_tenant), len(of_parent), rank, arrival

    def holder_for(self, seq: Sequence) -> Sequence | None:
        """Returns the running sequence that must make room for `seq`, or None.

        A tenant without a running sequence displaces the youngest sequence of the tenant with the most. A request
        without one displaces the youngest sequence of the same tenant's request with the most. Only a holder of several
        sequences is displaced, so two sequences never displace each other in turn. A sequence with a more urgent
        priority is never displaced.
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
