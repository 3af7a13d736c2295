from __future__ import annotations

from collections.abc import Callable

import pytest

from jamba_server.server.cli.bench.client import Client, Failure, Record, Reply
from jamba_server.server.cli.bench.runner import ClosedLoop, Load, Poisson, Replay, Runner
from jamba_server.server.cli.bench.sessions import Session, Turn
from tests.server.bench_fakes import FakeServer, run_virtual


def run(server: FakeServer, load: Load, sessions: list[Session], *, max_seconds: float = 1000.0) -> list[Record]:
    async def main(now: Callable[[], float]) -> list[Record]:
        async with server.http() as http:
            runner = Runner(Client(http, "tiny", now=now))
            await runner.run(load, sessions, max_seconds=max_seconds)
            return runner.records

    return run_virtual(main)


def single(count: int, *, max_tokens: int = 5) -> list[Session]:
    """Each takes 1 s on the fake server."""
    return [Session((Turn((number,), max_tokens),)) for number in range(count)]


@pytest.mark.parametrize(("concurrency", "starts"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 1, 1, 2]), (9, [0] * 5)])
def test_closed_loop_keeps_so_many_running(concurrency: int, starts: list[float]) -> None:
    server = FakeServer()
    records = run(server, ClosedLoop(concurrency), single(5))
    assert sorted(record.start for record in records) == starts
    assert all(record.end - record.start == 1.0 for record in records)
    assert server.most_running == min(concurrency, 5)
    assert sorted(body["prompt"] for body in server.bodies) == [[0], [1], [2], [3], [4]]


def test_open_loop_sends_at_the_given_times_whatever_still_runs() -> None:
    server = FakeServer()
    arrivals = [0.0, 0.25, 0.25, 3.0]
    sessions = [Session(session.turns, arrival) for session, arrival in zip(single(4), arrivals, strict=True)]
    for load in (Replay(), Poisson(1.0)):
        records = run(server, load, sessions)
        assert [record.start for record in records] == arrivals
    assert server.most_running == 3


def test_a_chat_feeds_the_real_replies_back() -> None:
    server = FakeServer()
    turns = (Turn("one", 2), Turn("two", 3, 0), Turn("three", 1, 1))
    records = run(server, ClosedLoop(1), [Session(turns)])
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"]]
    assert [message["content"] for message in server.bodies[2]["messages"]] == [
        "one",
        " t0 t1",
        "two",
        " t0 t1 t2",
        "three",
    ]
    assert [record.prompt_tokens for record in records if isinstance(record, Reply)] == [1, 4, 8]


def conversation() -> Session:
    """The second turn follows the first; the third one replaces the second."""
    turns = (
        Turn((1, 2, 3), 2, arrival=1.0),
        Turn((4,), 1, parent=0, history=5, arrival=1.5),
        Turn((5, 6), 1, parent=0, history=5, arrival=9.0),
    )
    return Session(turns, arrival=1.0)


def test_a_conversation_of_token_ids_continues_with_the_ids_of_the_reply() -> None:
    server = FakeServer()
    records = run(server, Replay(), [conversation()])
    assert [body["prompt"] for body in server.bodies] == [
        [1, 2, 3],
        [1, 2, 3, 7000, 7001, 4],
        [1, 2, 3, 7000, 7001, 5, 6],
    ]
    assert [body.get("return_token_ids", False) for body in server.bodies] == [True, False, False]
    # The first reply takes 0.625 s, so the second turn is late; the third one waits for its time in the trace. The
    # event with the ids of the prompt, which comes at once, is no token.
    assert [record.start for record in records] == [1.0, 1.625, 9.0]
    assert [record.ttft for record in records if isinstance(record, Reply)] == [0.5] * 3


def test_only_a_replay_waits_for_the_times_of_a_trace() -> None:
    records = run(FakeServer(), ClosedLoop(1), [conversation()])
    assert [record.start for record in records] == [0.0, 0.625, 1.125]


def test_a_server_without_token_ids_cannot_continue_a_conversation_of_them() -> None:
    server = FakeServer()
    server.returns_ids = False
    (record,) = run(server, Replay(), [conversation()])
    assert isinstance(record, Failure)
    assert record.kind == "no_token_ids"


def test_a_session_has_its_system_message_and_tools_in_every_request() -> None:
    server, tools = FakeServer(), ({"type": "function", "function": {"name": "look"}},)
    run(server, ClosedLoop(1), [Session((Turn("task", 1), Turn("result", 1, parent=0)), 0.0, "be brief", tools)])
    assert [body["tools"] for body in server.bodies] == [list(tools)] * 2
    assert [[message["content"] for message in body["messages"]] for body in server.bodies] == [
        ["be brief", "task"],
        ["be brief", "task", " t0", "result"],
    ]


def test_a_failure_ends_its_chat_and_no_other() -> None:
    server = FakeServer()
    server.refuse = {1: 503}
    records = run(server, ClosedLoop(1), [Session((Turn("one", 1), Turn("two", 1), Turn("three", 1)))] * 2)
    assert [record.kind if isinstance(record, Failure) else "ok" for record in records] == [
        "ok",
        "http_503",
        "ok",
        "ok",
        "ok",
    ]


def test_failures_do_not_stop_the_clients() -> None:
    server = FakeServer()
    server.refuse = {0: 503, 2: 400}
    records = run(server, ClosedLoop(2), single(6))
    assert sorted(record.kind for record in records if isinstance(record, Failure)) == ["http_400", "http_503"]
    assert sum(isinstance(record, Reply) for record in records) == 4


def test_a_truncated_stream_is_no_reply() -> None:
    server = FakeServer()
    server.break_after = 3
    (record,) = run(server, ClosedLoop(1), single(1))
    assert isinstance(record, Failure)
    assert record.kind == "incomplete"


@pytest.mark.parametrize("load", [ClosedLoop(2), Replay()])
def test_the_time_limit_cuts_off_what_runs_and_starts_nothing_more(load: Load) -> None:
    server = FakeServer()
    sessions = [Session(session.turns, float(number // 2)) for number, session in enumerate(single(6))]
    records = run(server, load, sessions, max_seconds=1.5)
    assert [(record.start, record.end, isinstance(record, Reply)) for record in records] == [
        (0.0, 1.0, True),
        (0.0, 1.0, True),
        (1.0, 1.5, False),
        (1.0, 1.5, False),
    ]
    assert {record.kind for record in records if isinstance(record, Failure)} == {"cut_off"}
    assert server.running == 0
