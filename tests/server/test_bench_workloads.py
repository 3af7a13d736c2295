from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.runner import ClosedLoop, Poisson, poisson_arrivals, schedule
from jamba_server.server.cli.bench.sessions import Session, TokenRange, Turn
from jamba_server.server.cli.bench.workloads import Agents, MultiTurn, Random, SharedPrefix, Trace, leave_out_long

TOKENS = TokenRange(10, 12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def prompts(sessions: list[Session]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for session in sessions:
        (turn,) = session.turns
        assert isinstance(turn.prompt, tuple)
        found.append(turn.prompt)
    return found


def test_random_prompts_have_exact_lengths_and_draw_the_whole_range() -> None:
    sessions = Random(input_len=40, output_len=7).sessions(rng(), 5, TOKENS)
    assert [len(prompt) for prompt in prompts(sessions)] == [40] * 5
    assert [session.turns[0].max_tokens for session in sessions] == [7] * 5
    assert {token for prompt in prompts(sessions) for token in prompt} == {10, 11, 12}


def test_random_prompts_depend_on_the_seed_alone() -> None:
    workload = Random(input_len=40, range_ratio=0.5)
    assert workload.sessions(rng(3), 6, TOKENS) == workload.sessions(rng(3), 6, TOKENS)
    assert workload.sessions(rng(3), 6, TOKENS) != workload.sessions(rng(4), 6, TOKENS)


def test_range_ratio_reaches_both_ends_and_no_further() -> None:
    sessions = Random(input_len=4, output_len=2, range_ratio=0.5).sessions(rng(), 200, TOKENS)
    assert {len(prompt) for prompt in prompts(sessions)} == {2, 3, 4, 5, 6}
    assert {session.turns[0].max_tokens for session in sessions} == {1, 2, 3}


def test_shared_prefixes_take_turns_and_suffixes_differ() -> None:
    found = prompts(SharedPrefix(prefix_len=30, num_prefixes=2, input_len=20).sessions(rng(), 6, TOKENS))
    heads = [prompt[:30] for prompt in found]
    assert heads[0] == heads[2] == heads[4] != heads[1] == heads[3] == heads[5]
    assert len({prompt[30:] for prompt in found}) == 6
    assert {len(prompt) for prompt in found} == {50}


def test_multi_turn_messages_are_text_of_so_many_words() -> None:
    (session,) = MultiTurn(turns=3, input_len=5, output_len=9).sessions(rng(), 1, TOKENS)
    assert [len(str(turn.prompt).split()) for turn in session.turns] == [5, 5, 5]
    assert {turn.max_tokens for turn in session.turns} == {9}
    assert len({turn.prompt for turn in session.turns}) == 3


def test_agents_share_a_system_prompt_and_tools_and_their_loops_grow() -> None:
    workload = Agents(prefix_len=30, tools=3, turns=4, input_len=9, result_len=5, output_len=2)
    one, two = workload.sessions(rng(), 2, TOKENS)
    assert len(one.system.split()) == 30
    assert (one.system, one.tools) == (two.system, two.tools)
    assert [tool["function"]["name"] for tool in one.tools] == ["tool_0", "tool_1", "tool_2"]
    assert len({tool["function"]["description"] for tool in one.tools}) == 3
    assert [len(str(turn.prompt).split()) for turn in one.turns] == [9, 5, 5, 5]
    assert [turn.parent for turn in one.turns] == [-1, 0, 1, 2]
    assert one.turns != two.turns


def test_a_trace_can_have_conversations(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"{30 * number},{100 * (number + 1)},9" for number in range(20)]
    path.write_text("\n".join(["seconds,input_tokens,output_tokens", *lines, ""]))
    for scale in (1.0, 0.01):
        sessions = Trace(trace=str(path), sharing="chats", time_scale=scale).sessions(rng(), 100, TokenRange(3, 900))
        assert 1 < len(sessions) < 20, "the time to think is on the clock of the trace"
        arrivals = sorted(turn.arrival for session in sessions for turn in session.turns)
        assert arrivals == pytest.approx([30 * number * scale for number in range(20)])
        lengths = sorted(turn.history + len(turn.prompt) for session in sessions for turn in session.turns)
        assert lengths == [100 * (number + 1) for number in range(20)]
    alone = Trace(trace=str(path)).sessions(rng(), 100, TOKENS)
    assert [len(session.turns) for session in alone] == [1] * 20


TRACE = "seconds,input_tokens,output_tokens\n2.000,3,4\n2.500,5,1\n4.000,1,2\n"


@pytest.mark.parametrize("suffix", [".csv", ".csv.xz"])
def test_trace_times_begin_at_zero_and_scale(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    path.write_bytes(lzma.compress(TRACE.encode()) if suffix.endswith("xz") else TRACE.encode())
    sessions = Trace(trace=str(path), time_scale=0.5).sessions(rng(), 100, TOKENS)
    assert [session.arrival for session in sessions] == [0.0, 0.25, 1.0]
    assert [len(prompt) for prompt in prompts(sessions)] == [3, 5, 1]
    assert [session.turns[0].max_tokens for session in sessions] == [4, 1, 2]


def test_trace_reads_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE + "garbage\n")
    assert len(Trace(trace=str(path)).sessions(rng(), 3, TOKENS)) == 3
    with pytest.raises(ConfigError, match=r"line 5: 'garbage'"):
        Trace(trace=str(path)).sessions(rng(), 4, TOKENS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,in,out\n1,1,1\n", "must begin with seconds,input_tokens,output_tokens, not 'time,in,out'"),
        ("", "must begin with"),
        ("seconds,input_tokens,output_tokens\n", "has no requests"),
        ("seconds,input_tokens,output_tokens\n1,1,1\n0.5,1,1\n", "line 3: '0.5,1,1'"),
        ("seconds,input_tokens,output_tokens\n1,0,1\n", "line 2"),
        ("seconds,input_tokens,output_tokens\n1,1,0\n", "line 2"),
        ("seconds,input_tokens,output_tokens\nnan,1,1\n", "line 2"),
        ("seconds,input_tokens,output_tokens\n1,1.5,1\n", "line 2"),
        ("seconds,input_tokens,output_tokens\n1,1\n", "line 2"),
    ],
)
def test_a_wrong_trace_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Trace(trace=str(path)).sessions(rng(), 10, TOKENS)


def test_a_trace_that_cannot_be_read(tmp_path: Path) -> None:
    damaged = tmp_path / "trace.csv.xz"
    damaged.write_bytes(lzma.compress(TRACE.encode())[:-20])
    for path in (damaged, tmp_path / "missing.csv"):
        with pytest.raises(ConfigError, match="cannot be read"):
            Trace(trace=str(path)).sessions(rng(), 10, TOKENS)


def test_poisson_arrivals_depend_on_the_seed_and_have_the_rate() -> None:
    arrivals = poisson_arrivals(rng(7), 20_000, 4.0)
    assert arrivals == poisson_arrivals(rng(7), 20_000, 4.0)
    assert arrivals[:50] != poisson_arrivals(rng(8), 50, 4.0)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert (gaps >= 0).all()
    # Exponential gaps of mean 1/4 s: mean and standard deviation agree within five standard errors.
    assert abs(gaps.mean() - 0.25) < 5 * 0.25 / 20_000**0.5
    assert abs(gaps.std() - 0.25) < 5 * 0.25 * 2**0.5 / 20_000**0.5


def test_only_poisson_gives_arrivals() -> None:
    sessions = [Session((Turn((1,), 1),), 5.0)] * 3
    assert schedule(ClosedLoop(2), sessions, rng()) is sessions
    assert [s.arrival for s in schedule(Poisson(4.0), sessions, rng(1))] == poisson_arrivals(rng(1), 3, 4.0)


def test_sessions_longer_than_the_context_are_left_out() -> None:
    sessions = [Session((Turn((1,) * length, 4),)) for length in (5, 6, 7)]
    chat = Session((Turn("a text of unknown length", 4),))
    assert leave_out_long([*sessions, chat], 10) == [*sessions[:2], chat]
    assert leave_out_long(sessions, None) == sessions
    long = Session((Turn((1,) * 5, 4), Turn((1,), 1, parent=0, history=9)))
    assert leave_out_long([long], 11) == [long]
    assert leave_out_long([long], 10) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Agents(result_len=0), r"--result-len 0 must be at least 1"),
        (lambda: Trace(trace="x", sharing="all"), r"--sharing 'all' must be one of: none, chats"),
        (lambda: Random(input_len=0), r"--input-len 0 must be at least 1"),
        (lambda: Random(range_ratio=1.0), r"--range-ratio 1 must be"),
        (lambda: SharedPrefix(num_prefixes=0), r"--num-prefixes 0"),
        (lambda: MultiTurn(turns=0), r"--turns 0"),
        (lambda: Trace(trace="x", time_scale=0.0), r"--time-scale 0"),
    ],
)
def test_numbers_out_of_range(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
