"""Clients that do not read their stream."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.server.asgi import TIMEOUT_SECONDS, Exchange
from tests.server.conftest import Bench, MakeBench, chat

CHAT = "/v1/chat/completions"


class NotReading(Exchange):
    """Reads `reads` messages and no more: `send` does not return, as when the connection's buffers are full."""

    reads = 3

    async def _send(self, message: Any) -> None:
        if self._sent.qsize() >= self.reads:
            await asyncio.Event().wait()
        await super()._send(message)

    async def end(self) -> None:
        await asyncio.wait_for(asyncio.shield(self._task), TIMEOUT_SECONDS)


async def test_a_kept_stream_goes_on_after_its_slow_client_was_cut_off(make_bench: MakeBench) -> None:
    bench = make_bench(send_timeout=0.05)
    async with NotReading(bench.app, CHAT, chat(stream=True), {"x-on-disconnect": "continue"}) as exchange:
        exchange.reads = 2
        await exchange.end()
        [start, first] = [await exchange.next_message() for _ in range(2)]
    assert bench.engine.aborted == []
    id_ = dict(start["headers"])[b"x-stream-id"].decode()
    async with bench.http() as http:
        whole = (await http.get(f"/v1/streams/{id_}")).content
    assert whole.startswith(first["body"])
    assert whole.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("reads", [0, 1, 3])  # not even the headers; the headers; a part of the reply
async def test_a_client_that_does_not_read_is_cut_off(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, reads: int
) -> None:
    bench = make_bench(send_timeout=0.05)
    async with NotReading(bench.app, CHAT, chat(stream=True)) as exchange:
        exchange.reads = reads
        await exchange.end()
    assert bench.engine.aborted == [bench.engine.requests[0].id]
    assert "the client has not read for 0.05 s (--send-timeout)" in caplog.text
    text = await metrics(bench)
    assert 'jamba_aborted_requests_total{model_name="jamba",reason="send_timeout"} 1.0' in text
    assert 'jamba_request_success_total{finished_reason="abort",model_name="jamba"} 1.0' in text


async def test_a_client_that_waits_for_the_engine_is_not_cut_off(make_bench: MakeBench) -> None:
    bench = make_bench(send_timeout=0.02, sse_keep_alive=0.01)
    bench.engine.limit = 2
    async with Exchange(bench.app, CHAT, chat(stream=True)) as exchange:
        assert await exchange.status() == 200
        pings = 0
        while pings < 5:  # which is longer than the limit
            pings += await exchange.next_bytes() == b": keep-alive\n\n"
        bench.engine.resume.set()
        while b"[DONE]" not in await exchange.next_bytes():
            pass
    assert bench.engine.aborted == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_counted(bench: Bench, stream: bool) -> None:
    bench.engine.limit = 3
    async with Exchange(bench.app, CHAT, chat(n=2, stream=stream)) as exchange:
        await asyncio.wait_for(bench.engine.stalled.wait(), TIMEOUT_SECONDS)
        exchange.disconnect()
    assert 'jamba_aborted_requests_total{model_name="jamba",reason="disconnect"} 2.0' in await metrics(bench)


async def metrics(bench: Bench) -> str:
    async with bench.http() as http:
        return (await http.get("/metrics")).text
