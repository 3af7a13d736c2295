"""The class `WaitingQueue` holds the sequences that wait for a free state slot, and finds the sequence that starts
next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from jamba_server.engine.fairness import Shares, urgency
from jamba_server.engine.sequence import Sequence


class WaitingQueue:
    """The queue of waiting sequences. A prompt counts as long if more than `max_short` of its tokens were not in the
    cache when it arrived.

    For each tenant (API key) there is one list of its long prompts and one list of its other prompts. In each list the
    most urgent sequence comes first. So the next sequence is usually found at the beginning of a list, however many
    sequences wait. The urgency and the length of a sequence do not change while it waits.
    """

    def __init__(self, max_short: int) -> None:
        self._max_short = max_short
        # the key of each list is its tenant and whether its prompts are long
        self._lists: dict[tuple[str, bool], list[Sequence]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Yields all waiting sequences, sorted by `Sequence.order`: by priority, and by arrival within a priority."""
        return iter(sorted((seq for queue in self._lists.values() for seq in queue), key=lambda s: s.order))

    def add(self, seq: Sequence) -> None:
        insort(self._lists.setdefault(self._key(seq), []), seq, key=urgency)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        key = self._key(seq)
        self._lists[key].remove(seq)
        self._length -= 1
        if not self._lists[key]:
            del self._lists[key]

    def next(
        self, shares: Shares, *, full: bool, with_long: bool, may_start: Callable[[Sequence], bool]
    ) -> Sequence | None:
        """Returns the sequence that should start next: the one with the smallest key `Shares.turn` among those that can
        start, or None if no sequence can start. A sequence can start if `may_start` returns true for it. A long prompt
        can start only if `with_long` is true. If all slots are taken (`full`), a sequence can start only if a running
        sequence must stop for it."""
        firsts = [
            self._first(queue, shares, full, may_start)
            for (tenant, is_long), queue in self._lists.items()
            if (with_long or not is_long) and (not full or shares.may_displace(tenant))
        ]
        return min((seq for seq in firsts if seq is not None), key=shares.turn, default=None)

    def _first(
        self, queue: list[Sequence], shares: Shares, full: bool, may_start: Callable[[Sequence], bool]
    ) -> Sequence | None:
        """Returns the sequence of the list `queue` that should start next: the one with the smallest key `Shares.turn`
        among those that can start.

        The list is sorted by priority and then by urgency. The key `turn` sorts by priority, then by the number of
        running sequences of the same client request, and then by urgency. So a sequence further back in the list is
        chosen only if it has the same priority and a smaller number of running sequences.
        """
        first, fewest = None, 0
        for seq in queue:
            if first is not None and (fewest == 0 or seq.order[0] > first.order[0]):
                break
            number = shares.num_running(seq)
            if number if full else first is not None and number >= fewest:
                continue
            if may_start(seq) and not (full and shares.holder_for(seq) is None):
                first, fewest = seq, number
        return first

    def _key(self, seq: Sequence) -> tuple[str, bool]:
        return seq.request.tenant, seq.num_uncached > self._max_short
