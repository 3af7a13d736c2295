"""The class `WaitingQueue` holds the sequences that wait for a free state slot, and finds the sequence that starts
next."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from jamba_server.engine.fairness import Shares, urgency
from jamba_server.engine.sequence import Sequence

Urgency = tuple[int, int, int]  # this is a result of `fairness.urgency`; no two sequences have the same


class _Key(NamedTuple):
    tenant: str
    is_long: bool
    background: bool


class WaitingQueue:
    """The queue of waiting sequences. A prompt counts as long if more than `max_short` of its tokens were not in the
    cache when it arrived.

    The sequences are in sorted lists within each other. For each tenant (API key) there is one list for its long
    prompts and one for its other prompts, and two more for its background sequences. Each of them has a list for each
    client request, which has a list for each group (the choices of one prompt). In all lists the most urgent sequence
    comes first. The sequences of a client request have the same number of running sequences, and the sequences of a
    group may either all start or all not. So the search for the next sequence looks at one sequence of each group that
    is running and at few others, however many sequences wait.
    """

    def __init__(self, max_short: int) -> None:
        self._max_short = max_short
        # the key of each list is its tenant, whether its prompts are long, and whether they are background sequences
        self._lists: dict[_Key, _Requests] = {}
        self._num_background = 0
        # For each sequence, this dict has its urgency when it was added and the key of its list. While a sequence is
        # being started, its urgency changes before it is removed from the queue.
        self._entries: dict[Sequence, tuple[Urgency, _Key]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        """Yields all waiting sequences, sorted by `Sequence.order`: by priority, and by arrival within a priority."""
        return iter(sorted(self._entries, key=lambda s: s.order))

    def number(self, background: bool) -> int:
        """Returns how many background sequences wait, or how many others."""
        return self._num_background if background else len(self._entries) - self._num_background

    def add(self, seq: Sequence) -> None:
        key = _Key(seq.request.tenant, seq.num_uncached > self._max_short, seq.is_background)
        rank = urgency(seq)
        self._entries[seq] = rank, key
        self._num_background += seq.is_background
        self._change(key, seq, lambda group: group.add(rank, seq))

    def remove(self, seq: Sequence) -> None:
        rank, key = self._entries.pop(seq)
        self._num_background -= seq.is_background
        self._change(key, seq, lambda group: group.remove(rank))
        if self._lists[key].first is None:
            del self._lists[key]

    def next(
        self,
        shares: Shares,
        *,
        full: bool,
        with_long: bool,
        may_start: Callable[[Sequence], bool],
        background: bool = False,
    ) -> Sequence | None:
        """Returns the sequence that should start next: the one with the smallest key `Shares.turn` among those that can
        start, or None if no sequence can start. A sequence can start if `may_start` returns true for it, whose result
        must be the same for all sequences of a group. A long prompt can start only if `with_long` is true. If all slots
        are taken (`full`), a sequence can start only if a running sequence must stop for it. Only background sequences
        are considered, or only others, as `background` says; `shares` has running sequences of the same kind."""
        firsts = [
            _first(requests, shares, full, may_start)
            for key, requests in self._lists.items()
            if key.background == background
            and (with_long or not key.is_long)
            and (not full or shares.may_displace(key.tenant))
        ]
        return min((seq for seq in firsts if seq is not None), key=shares.turn, default=None)

    def _change(self, key: _Key, seq: Sequence, change: Callable[[_Group], None]) -> None:
        """Calls `change` with the list of the group of `seq`."""
        requests = self._lists.get(key) or self._lists.setdefault(key, _Sorted(_new_groups))
        # The sequences of a request usually have one priority. If not, they do not share a list.
        name = f"{seq.order[0]} {seq.parent}"
        requests.change(name, lambda groups: groups.change(seq.request.group, change))


def _first(requests: _Requests, shares: Shares, full: bool, may_start: Callable[[Sequence], bool]) -> Sequence | None:
    """Returns the sequence in `requests` that should start next: the one with the smallest key `Shares.turn` among
    those that can start.

    The client requests are sorted by priority and then by urgency. The key `turn` sorts by priority, then by the number
    of running sequences of the same client request, and then by urgency. So a sequence of a later request is chosen
    only if it has the same priority and a smaller number of running sequences, or if the first sequence of an earlier
    request cannot start.
    """
    best, fewest = None, 0
    for groups in requests:
        ahead = next(iter(groups)).sequences[0]
        if best is not None and (ahead.order[0] > best.order[0] or (not fewest and urgency(ahead) > urgency(best))):
            break
        number = shares.num_running(ahead)
        if number if full else best is not None and number > fewest:
            continue
        seq = next((seq for group in groups if may_start(seq := group.sequences[0])), None)
        if seq is None or (full and shares.holder_for(seq) is None):
            continue
        if best is None or (number, urgency(seq)) < (fewest, urgency(best)):
            best, fewest = seq, number
    return best


class _Group:
    """The waiting choices of one prompt, sorted by urgency."""

    def __init__(self) -> None:
        self._ranks: list[Urgency] = []
        self.sequences: list[Sequence] = []

    @property
    def first(self) -> Urgency | None:
        """Returns the urgency of the most urgent sequence, or None if there is no sequence."""
        return self._ranks[0] if self._ranks else None

    def add(self, rank: Urgency, seq: Sequence) -> None:
        place = bisect_left(self._ranks, rank)
        self._ranks.insert(place, rank)
        self.sequences.insert(place, seq)

    def remove(self, rank: Urgency) -> None:
        place = bisect_left(self._ranks, rank)
        assert self._ranks[place] == rank, "the sequence is not in the queue"
        del self._ranks[place], self.sequences[place]


class _HasFirst(Protocol):
    @property
    def first(self) -> Urgency | None: ...


Part = TypeVar("Part", bound=_HasFirst)


class _Sorted(Generic[Part]):
    """Parts of the queue, each under a name, sorted by the urgency of the most urgent sequence of each. The function
    `make` makes a new, empty part."""

    def __init__(self, make: Callable[[], Part]) -> None:
        self._make = make
        self._parts: dict[str, Part] = {}
        self._order: list[tuple[Urgency, str]] = []

    @property
    def first(self) -> Urgency | None:
        """Returns the urgency of the most urgent sequence, or None if there is no sequence."""
        return self._order[0][0] if self._order else None

    def __iter__(self) -> Iterator[Part]:
        return (self._parts[name] for _, name in self._order)

    def change(self, name: str, change: Callable[[Part], None]) -> None:
        """Calls `change`, which adds or removes a sequence, with the part of this name. Sorts the parts again."""
        if (part := self._parts.get(name)) is None:
            part = self._parts[name] = self._make()
        before = part.first
        change(part)
        if (after := part.first) == before:
            return
        if before is not None:
            del self._order[bisect_left(self._order, (before, name))]
        if after is None:
            del self._parts[name]
        else:
            insort(self._order, (after, name))


def _new_groups() -> _Sorted[_Group]:
    return _Sorted(_Group)


_Requests = _Sorted[_Sorted[_Group]]
