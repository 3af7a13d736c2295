"""The rules of fairness: which prompt is computed first, and which running sequence is stopped to make room for a
waiting sequence. No rule uses a clock. Requests in the background (`Request.is_background`) share only what others
leave.

Prompts in progress and new ones share the token budget of a step. The prompt with the fewest tokens left comes first
(shortest remaining time first), so that a short prompt need not wait for a long one. Prompts age, so that none starves:
a prompt's advantage over later arrivals grows with the number of prompt tokens that were scheduled since it arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from jamba_server.engine.sequence import Sequence

# Limits how long short prompts can delay a long prompt: a later prompt can overtake a prompt of L tokens only if the
# engine schedules fewer than AGEING * L prompt tokens between the arrivals of these two prompts.
AGEING = 8
RESERVED_PART = 4  # prompts that need several steps leave 1/RESERVED_PART of each step's token budget to other prompts
# While replies of other requests are generated, prompts in the background get 1/BACKGROUND_PART of each step's token
# budget, because all these replies wait for the step.
BACKGROUND_PART = 4
# Maximum number of long prompts (prompts that need several steps) that the engine computes at the same time. The number
# is limited because each long prompt occupies many cache pages.
MAX_LONG_PREFILLS = 2


def tokens_left(seq: Sequence) -> int:
    """Returns how many tokens of `seq` must be computed before the next token of `seq` can be sampled. For a new
    sequence in the queue, this is the number of the sequence's tokens that were not in the cache when the sequence
    arrived. For a preempted sequence in the queue, 0 is returned."""
    return seq.num_remaining if seq.state_id else seq.num_uncached


def urgency(seq: Sequence) -> tuple[int, int, int]:
    """Returns a key that sorts prompts, the most urgent first. The priority of the request comes first in the key. So a
    prompt never overtakes a prompt of a more urgent priority, however long the prompt has waited."""
    priority, arrival = seq.order
    return priority, AGEING * tokens_left(seq) + seq.work_before, arrival


class Shares:
    """The lists of running sequences, by tenant (API key) and by client request. A client request may have several
    sequences, one for each reply."""

    def __init__(self, running: Iterable[Sequence]) -> None:
        self._by_tenant: dict[str, list[Sequence]] = {}
        self._by_parent: dict[tuple[str, str], list[Sequence]] = {}
        for seq in running:
            self._by_tenant.setdefault(seq.request.tenant, []).append(seq)
            self._by_parent.setdefault((seq.request.tenant, seq.parent), []).append(seq)
        self._displaced: dict[str, Sequence | None] = {}

    def num_running(self, seq: Sequence) -> int:
        """Returns how many sequences of the same client request are running."""
        return len(self._by_parent.get((seq.request.tenant, seq.parent), ()))

    @property
    def one_holds_several(self) -> bool:
        """Returns whether some client request has more than one running sequence."""
        return any(len(choices) > 1 for choices in self._by_parent.values())

    def turn(self, seq: Sequence) -> tuple[int, int, int, int, int]:
        """Returns a key that sorts waiting sequences; the sequence with the smallest key should start next. Within a
        priority, sequences of the tenant with the fewest running sequences come first. Within a tenant, sequences of
        the client request with the fewest running sequences come first."""
        priority, rank, arrival = urgency(seq)
        tenant = seq.request.tenant
        return priority, len(self._by_tenant.get(tenant, ())), self.num_running(seq), rank, arrival

    def holder_for(self, seq: Sequence) -> Sequence | None:
        """Returns the running sequence that must stop to make room for the waiting sequence `seq`, or None if `seq` has
        to wait.

        A tenant without a running sequence displaces the youngest sequence of the tenant with the most running
        sequences. A client request without a running sequence displaces the youngest sequence of the request that has
        the most among those of the same tenant. Only a tenant or request with several running sequences loses one, so
        two sequences never displace each other in turn. A sequence with a more urgent priority is never displaced.
        """
        if self.num_running(seq):
            return None
        youngest = self._displaced_by(seq.request.tenant)
        return youngest if youngest is not None and youngest.order[0] >= seq.order[0] else None

    def may_displace(self, tenant: str) -> bool:
        """Returns whether some waiting sequence of a tenant could take the slot of a running sequence. If the result is
        false, `holder_for` returns None for all of them."""
        return self._displaced_by(tenant) is not None

    def _displaced_by(self, tenant: str) -> Sequence | None:
        """Returns the running sequence that must stop to make room for a new client request of a tenant, or None if no
        sequence must stop. The priorities of the two are not compared here."""
        if tenant not in self._by_tenant:
            return self._youngest_of_largest_tenant
        if tenant not in self._displaced:
            holders = [choices for (owner, _), choices in self._by_parent.items() if owner == tenant]
            self._displaced[tenant] = _youngest_of_largest(holders)
        return self._displaced[tenant]

    @cached_property
    def _youngest_of_largest_tenant(self) -> Sequence | None:
        return _youngest_of_largest(self._by_tenant.values())


def _youngest_of_largest(holders: Iterable[list[Sequence]]) -> Sequence | None:
    """Returns the sequence that arrived last among those in the longest list, or None if no list has several
    sequences."""
    most = max(holders, key=len, default=[])
    return max(most, key=lambda s: s.order) if len(most) > 1 else None
