"""The model that makes conversations of a trace's rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from jamba_server.server.cli.bench.sessions import Session, TokenRange, Turn
from jamba_server.server.cli.bench.trees import ChatTrees, Row

TOKENS = TokenRange(10, 30_000)


def rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    seconds = np.cumsum(rng.exponential(1.0, count)).tolist()
    return [Row(at, int(rng.integers(20, 3000)), int(rng.integers(1, 300))) for at in seconds]


def grow(model: ChatTrees, given: list[Row], seed: int = 0) -> list[Session]:
    return model.grow(given, np.random.default_rng(seed), TOKENS)


def whole_prompt(session: Session, turn: Turn) -> tuple[int | None, ...]:
    """The prompt with its history; the tokens of replies, which only a server knows, are None."""
    assert isinstance(turn.prompt, tuple)
    if turn.parent < 0:
        return turn.prompt
    parent = session.turns[turn.parent]
    return (*whole_prompt(session, parent), *[None] * parent.max_tokens, *turn.prompt)


def test_every_row_is_sent_with_its_own_length_and_time() -> None:
    given = rows(300)
    sessions = grow(ChatTrees(), given)
    sent = sorted(
        (turn.arrival, len(whole_prompt(session, turn)), turn.max_tokens)
        for session in sessions
        for turn in session.turns
    )
    assert sent == [(row.seconds - given[0].seconds, row.input_tokens, row.output_tokens) for row in given]
    for session in sessions:
        assert session.arrival == session.turns[0].arrival
        for number, turn in enumerate(session.turns):
            assert turn.parent < number
            assert len(whole_prompt(session, turn)) == turn.history + len(turn.prompt)
            assert turn.num_tokens == turn.history + len(turn.prompt) + turn.max_tokens


def test_a_user_thinks_between_two_turns() -> None:
    sessions = grow(ChatTrees(think=7.0), rows(300))
    gaps = [b.arrival - a.arrival for session in sessions for a, b in pairwise(session.turns)]
    assert len(gaps) > 50
    assert min(gaps) >= 7.0


def test_the_shares_are_those_of_the_model() -> None:
    given = [Row(100.0 * number, 50 * (number + 2), 3) for number in range(1000)]  # every chat fits into the next row
    sessions = grow(ChatTrees(continued=0.75, rewound=0.2, systems=1, system_least=64, system_most=65), given)
    turns = [(number, turn) for session in sessions for number, turn in enumerate(session.turns)]
    continued = [(number, turn) for number, turn in turns if number]
    assert len(continued) / len(turns) == pytest.approx(0.75, abs=0.04)
    # A rewound turn replaces an earlier one, so it never follows the last turn.
    assert sum(turn.parent < number - 1 for number, turn in continued) / len(continued) == pytest.approx(0.2, abs=0.04)


def test_nothing_continues_where_nothing_fits() -> None:
    given = [Row(100.0 * number, 300, 5) for number in range(50)]
    assert [len(session.turns) for session in grow(ChatTrees(), given)] == [1] * 50


def test_chats_share_system_prompts_and_nothing_else() -> None:
    sessions = grow(ChatTrees(systems=3, system_least=40, system_most=50, continued=0.0), rows(200))
    starts = {session.turns[0].prompt[: session.turns[0].system] for session in sessions if session.turns[0].system}
    assert len(starts) == 3
    rest = [session.turns[0].prompt[session.turns[0].system :] for session in sessions]
    assert len({text[:8] for text in rest if len(text) >= 8}) == sum(len(text) >= 8 for text in rest)
    assert all(session.turns[0].system or len(session.turns[0].prompt) <= 50 for session in sessions)


def test_the_seed_decides_everything() -> None:
    assert grow(ChatTrees(), rows(100)) == grow(ChatTrees(), rows(100))
    assert grow(ChatTrees(), rows(100)) != grow(ChatTrees(), rows(100), seed=1)
