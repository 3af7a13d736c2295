"""The queue finds the same sequence as a search through all of it, and finds it at once."""

from __future__ import annotations

from random import Random

import pytest

from jamba_server.engine.fairness import Shares, tokens_left
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.engine.waiting import WaitingQueue
from tests.nightly import nightly

MAX_SHORT = 50


def sequence(random: Random, number: int, *, running: bool) -> Sequence:
    request = Request(
        id=str(number),
        prompt=[0] * random.randint(1, 100),
        params=SamplingParams(),
        tenant=random.choice("ABC"),
        parent=random.choice("pqrstu"),
        group=random.choice(("", "g", "h")),
        priority=random.choice((0, 0, 1)),
    )
    seq = Sequence.of(request, arrival=number, now=0.0)
    seq.work_before, seq.num_uncached = random.randint(0, 1000), len(request.prompt)
    seq.state_id = int(running)
    return seq


@pytest.mark.parametrize("seed", [*range(40), *nightly(range(40, 200))])
def test_it_finds_what_a_search_through_all_finds(seed: int) -> None:
    random = Random(seed)
    running = [sequence(random, i, running=True) for i in range(random.randint(0, 12))]
    waiting = [sequence(random, 100 + i, running=False) for i in range(random.randint(0, 60))]
    queue = WaitingQueue(MAX_SHORT)
    for seq in waiting:
        queue.add(seq)
    for seq in random.sample(waiting, len(waiting) // 3):
        queue.remove(seq)
        waiting.remove(seq)
    assert list(queue) == sorted(waiting, key=lambda s: s.order)
    assert len(queue) == len(waiting)
    shares = Shares(running)
    full, with_long, blocked = (
        random.random() < 0.5,
        random.random() < 0.5,
        random.choice([(), ("p",), ("p", "q", "r g"), ("p g", "q h")]),
    )

    def may_start(seq: Sequence) -> bool:
        return seq.parent not in blocked and f"{seq.parent} {seq.request.group}" not in blocked

    expected = min(
        (
            seq
            for seq in waiting
            if (with_long or tokens_left(seq) <= MAX_SHORT)
            and not (full and shares.holder_for(seq) is None)
            and may_start(seq)
        ),
        key=shares.turn,
        default=None,
    )
    found = queue.next(shares, full=full, with_long=with_long, may_start=may_start)
    assert found is expected


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("num_long", [0, 2000])
def test_a_long_queue_is_not_searched(full: bool, num_long: int) -> None:
    queue = WaitingQueue(MAX_SHORT)
    for i in range(2000):
        prompt = [0] * (100 if i < num_long else 10)
        request = Request(id=str(i), prompt=prompt, params=SamplingParams(), tenant=f"key {i % 2}")
        seq = Sequence.of(request, arrival=i, now=0.0)
        seq.num_uncached = len(prompt)
        queue.add(seq)
    running = [
        Sequence.of(Request(id=f"r{i}", prompt=[0], params=SamplingParams(), tenant=f"key {i % 2}"), arrival=i, now=0.0)
        for i in range(64)
    ]
    asked: list[Sequence] = []

    def may_start(seq: Sequence) -> bool:
        asked.append(seq)
        return True

    queue.next(Shares(running), full=full, with_long=False, may_start=may_start)
    assert len(asked) <= 2


def choice(number: int, parent: int, group: int = 0) -> Sequence:
    request = Request(
        id=str(number), prompt=[0] * 10, params=SamplingParams(), parent=str(parent), group=f"{parent} {group}"
    )
    seq = Sequence.of(request, arrival=number, now=0.0)
    seq.num_uncached = 10
    return seq


@pytest.mark.parametrize("full", [True, False])
def test_thousands_of_choices_are_not_searched(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All client requests but the last run a sequence, and no choice of most prompts may start."""
    queue, requests, groups = WaitingQueue(MAX_SHORT), 20, 10
    for number in range(4000):
        queue.add(choice(number, number // 200, number // 20 % groups))
    last = choice(5000, requests)
    queue.add(last)
    shares = Shares([choice(6000 + n, n // 2) for n in range(2 * requests)])
    asked: list[Sequence] = []
    num_running = shares.num_running
    monkeypatch.setattr(shares, "num_running", lambda seq: asked.append(seq) or num_running(seq))

    def may_start(seq: Sequence) -> bool:
        asked.append(seq)
        return not seq.request.group.endswith(("0", "1")) or seq is last

    assert queue.next(shares, full=full, with_long=True, may_start=may_start) is last
    assert len(asked) < 6 * requests
    for number in range(4000):  # each is found again, and removed
        found = queue.next(Shares([]), full=False, with_long=True, may_start=lambda seq: True)
        assert found is not None and int(found.request.id) == number
        queue.remove(found)
