"""A client that goes away ends its requests: in the queue, in the prefill, in the middle of the reply."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.server.asgi import TIMEOUT_SECONDS, Exchange
from tests.server.conftest import Bench, MakeBench, chat
from tests.server.fake_engine import FakeEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def body_for(path: str, *, stream: bool) -> dict[str, object]:
    return chat(n=2, stream=stream) if path == CHAT else {"prompt": ["a", "b"], "stream": stream}


async def within(waiter: asyncio.Event) -> None:
    await asyncio.wait_for(waiter.wait(), TIMEOUT_SECONDS)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("limit", [0, 1, 5])  # no update yet; prefill of the other choice; both in the reply
async def test_gone(bench: Bench, path: str, stream: bool, limit: int) -> None:
    bench.engine.limit = limit
    async with Exchange(bench.app, path, body_for(path, stream=stream)) as exchange:
        await within(bench.engine.stalled)
        assert not bench.engine.left.is_set()
        exchange.disconnect()
        await within(bench.engine.left)
    assert sorted(bench.engine.aborted) == sorted(request.id for request in bench.engine.requests)
    assert len(bench.engine.aborted) == 2


async def test_only_what_still_runs_is_aborted(bench: Bench) -> None:
    bench.engine.limit = 40
    async with Exchange(bench.app, CHAT, chat(n=2, stream=True)) as exchange:
        while b"[DONE]" not in (message := await exchange.next_message()).get("body", b""):
            assert message
    assert bench.engine.left.is_set()
    assert bench.engine.aborted == []


@pytest.mark.parametrize("stream", [True, False])
async def test_gone_from_a_real_connection(make_bench: MakeBench, engine: FakeEngine, stream: bool) -> None:
    engine.limit = 2
    async with make_bench().served() as address:
        async with httpx.AsyncClient() as http:
            reply = asyncio.create_task(http.post(f"{address}{CHAT}", json=chat(stream=stream)))
            await within(engine.stalled)
            reply.cancel()
            await asyncio.gather(reply, return_exceptions=True)
        await within(engine.left)
    assert engine.aborted == [engine.requests[0].id]


async def test_the_metrics_and_the_log_know(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench.engine.limit = 3
    async with Exchange(bench.app, CHAT, chat(stream=True)) as exchange:
        await within(bench.engine.stalled)
        exchange.disconnect()
        await within(bench.engine.left)
    async with bench.http() as http:
        text = (await http.get("/metrics")).text
    assert 'jamba_request_success_total{finished_reason="abort",model_name="jamba"} 1.0' in text
    assert 'jamba_e2e_request_latency_seconds_count{model_name="jamba"}' not in text
    assert "generated=3" in caplog.text
    assert "finish=abort" in caplog.text


async def test_gone_while_the_body_is_on_its_way(bench: Bench) -> None:
    sent: list[str] = []
    messages: list[dict[str, object]] = [
        {"type": "http.request", "body": b'{"mess', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        sent.append(str(message.get("status", "")))

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b"", "root_path": ""}
    await bench.app(scope, receive, send)
    assert sent[0] == "499"
    assert bench.engine.requests == []
