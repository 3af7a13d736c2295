from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import httpx
import pytest
from typing_extensions import override

from jamba_server.server.cli.bench.client import Client, Context, EventDecoder, Failure, Message, Record, Reply
from jamba_server.server.cli.bench.sessions import Turn
from tests.server.bench_fakes import FakeServer, run_virtual

TURN = Turn((5, 6, 7), 4)


def send(server: FakeServer, turn: Turn = TURN, context: Context | None = None) -> Record:
    async def main(now: Callable[[], float]) -> Record:
        async with server.http() as http:
            return await Client(http, "tiny", now=now).send(turn, context or Context())

    return run_virtual(main)


# Server-sent events -------------------------------------------------------------------------------------------------

STREAM = (
    ": keep-alive\n\n"
    'data: {"a": "€ü"}\r\n\r\n'
    "event: token\rdata:no space\r\r"
    "data: two\ndata:  lines\nid: 7\n\n"
    "data: a\r\ndata: b\r\n\r\n"
    "retry: 10\n\n"
    "data\n\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = ['{"a": "€ü"}', "no space", "two\n lines", "a\nb", "", "[DONE]"]


def decode(chunks: list[bytes]) -> list[str]:
    decoder = EventDecoder()
    return [event.decode() for chunk in chunks for event in decoder.feed(chunk)]


def test_events_do_not_depend_on_where_one_cut_falls() -> None:
    for cut in range(len(STREAM) + 1):
        assert decode([STREAM[:cut], STREAM[cut:]]) == EVENTS


def test_events_do_not_depend_on_many_cuts() -> None:
    assert decode([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS
    rng = random.Random(0)
    for _ in range(200):
        cuts = [0, *sorted(rng.choices(range(len(STREAM)), k=9)), len(STREAM)]
        assert decode([STREAM[a:b] for a, b in pairwise(cuts)]) == EVENTS


def test_an_unfinished_event_is_withheld() -> None:
    assert decode([b"data: one\n\ndata: tw"]) == ["one"]


# Requests -----------------------------------------------------------------------------------------------------------


def test_a_completion_is_timed_exactly() -> None:
    server = FakeServer(prefill=0.5, step=0.125)
    server.cached = 2
    assert send(server) == Reply(
        start=0.0,
        arrivals=(0.5, 0.625, 0.75, 0.875),
        end=0.875,
        prompt_tokens=3,
        output_tokens=4,
        max_tokens=4,
        cached_tokens=2,
        text=" t0 t1 t2 t3",
    )


def test_the_body_of_a_completion_fixes_the_lengths() -> None:
    server = FakeServer()
    send(server)
    assert server.bodies == [
        {
            "path": "/v1/completions",
            "model": "tiny",
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_the_role_of_a_chat_is_not_its_first_token() -> None:
    server = FakeServer(prefill=0.5)
    context = Context((Message("user", "one"), Message("assistant", "two")))
    record = send(server, Turn("three four", 2), context)
    assert isinstance(record, Reply)
    assert record.arrivals == (0.5, 0.625)
    assert (record.text, record.prompt_tokens) == (" t0 t1", 4)
    assert server.bodies[0]["path"] == "/v1/chat/completions"
    assert server.bodies[0]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three four"},
    ]


def reply_with(*chunks: bytes, status: int = 200, error: Exception | None = None) -> Record:
    class Stream(httpx.AsyncByteStream):
        @override
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk
            if error is not None:
                raise error

    async def main(now: Callable[[], float]) -> Record:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=Stream()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await Client(http, "tiny", now=now).send(TURN, Context())

    return run_virtual(main)


TOKEN = b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n'
FINISH = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_an_event_without_text_is_a_token_unless_it_only_finishes() -> None:
    empty = b'data: {"choices": [{"text": "", "finish_reason": null}]}\n\n'
    last = b'data: {"choices": [{"text": "y", "finish_reason": "length"}]}\n\n'
    for chunks, arrivals in (((TOKEN, empty, FINISH), 2), ((TOKEN, last), 2), ((FINISH,), 1)):
        record = reply_with(*chunks, USAGE, DONE)
        assert isinstance(record, Reply)
        assert len(record.arrivals) == arrivals


@pytest.mark.parametrize(
    ("chunks", "kind", "message"),
    [
        ((TOKEN, FINISH, USAGE), "incomplete", "without [DONE]"),
        ((TOKEN, FINISH, DONE), "incomplete", "no usage"),
        ((TOKEN, USAGE, DONE), "incomplete", "no finish_reason"),
        ((TOKEN, b'data: {"error": {"message": "The engine died.", "code": 500}}\n\n', DONE), "stream_error", "died"),
        ((b"data: {nonsense\n\n", DONE), "stream_error", "{nonsense"),
        ((b'data: {"choices": 3}\n\n', DONE), "stream_error", "choices"),
    ],
)
def test_a_broken_stream_is_a_failure(chunks: tuple[bytes, ...], kind: str, message: str) -> None:
    record = reply_with(*chunks)
    assert isinstance(record, Failure)
    assert record.kind == kind
    assert message in record.message


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (503, b'{"error": {"message": "The queue is full.", "code": "overloaded"}}', "http_503", "The queue is full."),
        (400, b"plain text", "http_400", "plain text"),
        (502, b"x" * 10_000, "http_502", "x" * 300),
        (307, b"", "http_307", ""),
    ],
)
def test_a_refused_request_is_a_failure_of_its_status(status: int, body: bytes, kind: str, message: str) -> None:
    record = reply_with(body, status=status)
    assert isinstance(record, Failure)
    assert (record.kind, record.message) == (kind, message)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ReadError("reset"), "connection"),
        (httpx.RemoteProtocolError("cut"), "connection"),
        (httpx.ReadTimeout("slow"), "timeout"),
    ],
)
def test_a_lost_connection_is_a_failure(error: Exception, kind: str) -> None:
    record = reply_with(TOKEN, error=error)
    assert isinstance(record, Failure)
    assert record.kind == kind
