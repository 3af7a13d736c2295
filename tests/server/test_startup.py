"""Requests that come while the engine loads for the first time: they wait, within bounds, and can go away."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from jamba_server.engine.process.client import Health
from tests.server.asgi import TIMEOUT_SECONDS, Exchange
from tests.server.conftest import Bench, MakeBench, chat

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS = (
    ("POST", CHAT, chat()),
    ("POST", COMPLETIONS, {"prompt": "a"}),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/jamba", None),
)


@pytest.fixture
def loading(make_bench: MakeBench) -> Bench:
    bench = make_bench(startup_wait=3600.0)
    bench.engine.load("loading weights", 0.5)
    return bench


async def until_waiting(bench: Bench, number: int) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while bench.engine.num_waiting != number:
            await asyncio.sleep(0)


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
async def test_a_request_waits_until_the_engine_has_loaded(
    loading: Bench, method: str, path: str, body: object
) -> None:
    async with loading.http() as http:
        reply = asyncio.create_task(http.request(method, path, json=body))
        await until_waiting(loading, 1)
        assert not reply.done()
        loading.engine.start()
        assert (await reply).status_code == 200


async def test_a_stream_waits_too(loading: Bench) -> None:
    async with Exchange(loading.app, CHAT, chat(stream=True)) as exchange:
        await until_waiting(loading, 1)
        assert exchange.silent
        loading.engine.start()
        assert await exchange.status() == 200


@pytest.mark.parametrize(("method", "path", "body"), REQUESTS)
async def test_it_does_not_wait_for_ever(make_bench: MakeBench, method: str, path: str, body: object) -> None:
    bench = make_bench(startup_wait=0.0)
    bench.engine.load("loading weights", 0.5)
    async with bench.http() as http:
        reply = await http.request(method, path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (503, "engine_loading")
    assert "loading weights: 50%" in error["message"]
    assert "--startup-wait" in error["message"]
    assert int(reply.headers["Retry-After"]) > 0
    assert bench.engine.num_waiting == 0


async def test_an_engine_that_cannot_load_ends_the_wait(loading: Bench) -> None:
    async with loading.http() as http:
        reply = asyncio.create_task(http.post(CHAT, json=chat()))
        await until_waiting(loading, 1)
        loading.engine.start(Health(alive=False, ready=False, reason="the model is broken"))
        error = (await reply).json()["error"]
    assert (error["code"], error["message"]) == ("engine_dead", "the model is broken")


async def test_a_bad_request_does_not_wait(loading: Bench) -> None:
    async with loading.http() as http:
        assert (await http.post(CHAT, json={})).status_code == 400
    assert not loading.engine.waits.is_set()


@pytest.mark.parametrize("stream", [True, False])
async def test_who_goes_away_waits_no_longer(loading: Bench, stream: bool) -> None:
    async with Exchange(loading.app, CHAT, chat(stream=stream)) as exchange:
        await until_waiting(loading, 1)
        exchange.disconnect()
        await until_waiting(loading, 0)
        assert await exchange.status() == 499
    assert loading.engine.requests == []


async def test_gone_from_a_real_connection(loading: Bench) -> None:
    async with loading.served() as address:
        async with httpx.AsyncClient() as http:
            reply = asyncio.create_task(http.get(f"{address}/v1/models"))
            await asyncio.wait_for(loading.engine.waits.wait(), TIMEOUT_SECONDS)
            reply.cancel()
            await asyncio.gather(reply, return_exceptions=True)
        await until_waiting(loading, 0)


async def test_the_queue_has_a_bound_that_who_leaves_makes_room_in(make_bench: MakeBench) -> None:
    bench = make_bench(startup_wait=3600.0, max_queue_requests=3)
    bench.engine.load("loading weights", 0.5)
    async with bench.http() as http:
        async with Exchange(bench.app, CHAT, chat(n=2)) as exchange:
            first = asyncio.create_task(http.post(COMPLETIONS, json={"prompt": "a"}))
            await until_waiting(bench, 2)
            refused = await http.post(CHAT, json=chat())
            exchange.disconnect()
            await until_waiting(bench, 1)
        second = asyncio.create_task(http.post(CHAT, json=chat()))
        await until_waiting(bench, 2)
        bench.engine.start()
        assert [(await reply).status_code for reply in (first, second)] == [200, 200]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert "--max-queue-requests" in refused.json()["error"]["message"]
