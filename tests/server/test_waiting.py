"""The queue's limits in tokens and choices, and the time that a client gives its request."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.server.http.limits.waiting import Admission, WaitingTokens
from tests.server.asgi import Exchange
from tests.server.conftest import Bench, MakeBench, chat

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def requests_of(*lengths: int, n: int = 1) -> list[Request]:
    return [
        Request(id=f"{number}-{index}", prompt=[5] * length, params=SamplingParams(), index=index)
        for number, length in enumerate(lengths)
        for index in range(n)
    ]


def test_tokens_wait_until_the_first_token_of_the_reply() -> None:
    waiting = WaitingTokens(100)
    with Admission(requests_of(30, 20, n=2), waiting, None) as admission:
        assert (waiting.total, waiting.num_choices) == (50, 4)
        admission.count(TokenUpdate(request_id="0-0", num_cached=4))
        assert waiting.total == 50
        for _ in range(2):
            admission.count(TokenUpdate(request_id="0-0", token_ids=[7]))
        assert (waiting.total, waiting.num_choices) == (20, 3)
    assert (waiting.total, waiting.num_choices) == (0, 0)


def test_tokens_beyond_the_limit() -> None:
    waiting = WaitingTokens(100)
    with Admission(requests_of(70), waiting, None):
        with pytest.raises(Overloaded, match="70 prompt tokens are waiting, and the prompts have 31"):
            Admission(requests_of(31), waiting, None).__enter__()
        with pytest.raises(RequestRejected, match=r"101 tokens together; the limit \(--max-queue-tokens\) is 100"):
            Admission(requests_of(51, 50), waiting, None).__enter__()
        with Admission(requests_of(30), waiting, None):
            assert waiting.total == 100
    assert (waiting.total, waiting.num_choices) == (0, 0)


async def test_a_request_larger_than_the_queue_is_a_400(make_bench: MakeBench) -> None:
    async with make_bench(max_queue_tokens=20).http() as http:
        reply = await http.post(COMPLETIONS, json={"prompt": [[5] * 15, [5] * 15]})
        assert (await http.post(COMPLETIONS, json={"prompt": [5] * 15})).status_code == 200
    assert reply.status_code == 400
    assert "30 tokens together" in reply.json()["error"]["message"]


async def test_a_full_queue_refuses_before_the_body_is_read(make_bench: MakeBench) -> None:
    """The gate counts choices that run without a token, too, so it never refuses what the queue would take."""
    bench = make_bench(max_queue_requests=2, max_num_seqs=1)
    bench.engine.limit = 0
    async with bench.http() as http:
        running = asyncio.create_task(http.post(CHAT, json=chat(n=3)))
        await bench.engine.stalled.wait()
        invalid = await http.post(CHAT, json={"messages": 5})
        other = await http.post("/tokenize", json={"prompt": "a"})
        bench.engine.resume.set()
        assert (await running).status_code == 200
        assert (await http.post(CHAT, json={"messages": 5})).status_code == 400
    assert (invalid.status_code, other.status_code) == (503, 200)
    assert int(invalid.headers["retry-after"]) >= 1


# Deadlines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"X-Request-Timeout": "0.05"}])
async def test_a_reply_that_comes_too_late_is_a_504(bench: Bench, headers: dict[str, str]) -> None:
    bench.engine.limit = 3
    body = chat() if headers else chat(timeout=0.05)
    async with bench.http() as http:
        reply = await http.post(CHAT, json=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "after 0.05 s" in reply.json()["error"]["message"]
    assert bench.engine.aborted == [bench.engine.requests[0].id]


async def test_a_stream_that_takes_too_long_ends_with_an_error(bench: Bench) -> None:
    bench.engine.limit = 3
    received = b""
    async with Exchange(bench.app, CHAT, chat(stream=True), {"x-request-timeout": "0.05"}) as exchange:
        assert await exchange.status() == 200
        while b"error" not in received:
            received = await exchange.next_bytes()
    assert json.loads(received.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert bench.engine.aborted == [bench.engine.requests[0].id]


async def test_the_field_goes_before_the_header(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.post(CHAT, json=chat(timeout=100), headers={"X-Request-Timeout": "0.0000001"})
    assert reply.status_code == 200


async def test_a_wait_for_the_engine_counts(make_bench: MakeBench) -> None:
    bench = make_bench(startup_wait=3600.0)
    bench.engine.load("loading weights", 0.5)
    async with bench.http() as http:
        reply = await http.post(COMPLETIONS, json={"prompt": "a", "timeout": 0.05})
    assert (reply.status_code, bench.engine.num_waiting) == (504, 0)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9", ""])
async def test_a_header_that_is_no_time(bench: Bench, value: str) -> None:
    async with bench.http() as http:
        reply: httpx.Response = await http.post(CHAT, json=chat(), headers={"X-Request-Timeout": value})
    assert reply.status_code == 400
    assert "X-Request-Timeout" in reply.json()["error"]["message"]
