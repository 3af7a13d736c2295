"""Clients that lose the connection of their stream and continue to read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jamba_server.engine.errors import EngineDead
from tests.server.asgi import TIMEOUT_SECONDS, Exchange
from tests.server.conftest import HELLO, Bench, Ids, MakeBench, chat
from tests.server.edge_server import edge_server
from tests.server.fake_engine import FakeEngine, says
from tests.server.test_metrics import samples, scrape

CONTINUE = {"x-on-disconnect": "continue"}
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(stream=True),
    "/v1/completions": {"prompt": "Hi", "stream": True},
    "/v1/responses": {"input": "Hi", "stream": True},
    "/v1/messages": {"model": "jamba", "max_tokens": 50, **chat(stream=True)},
}


def is_event(data: bytes) -> bool:
    return data.startswith(b"id: ")


def number_of(event: bytes) -> int:
    return int(event.partition(b"\n")[0].rpartition(b":")[2])


async def begin(exchange: Exchange) -> str:
    """The reply begins; returns the id of its stream."""
    message = await exchange.next_message()
    assert message["status"] == 200, await exchange.next_message()
    return dict(message["headers"])[b"x-stream-id"].decode()


async def events(exchange: Exchange, limit: float = float("inf")) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < limit and (data := await exchange.next_bytes()):
        assert is_event(data)
        found.append(data)
    return found


def resumed(bench: Bench, id_: str, start: int, **headers: str) -> Exchange:
    return Exchange(bench.app, f"/v1/streams/{id_}?from={start}", {}, headers, method="GET")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_goes_on_over_another_connection(bench: Bench, path: str) -> None:
    bench.engine.limit = 3
    async with Exchange(bench.app, path, BODIES[path], CONTINUE) as exchange:
        id_ = await begin(exchange)
        head = await events(exchange, 2)
        await asyncio.wait_for(bench.engine.stalled.wait(), TIMEOUT_SECONDS)
        exchange.disconnect()
        bench.engine.resume.set()
        await asyncio.wait_for(bench.engine.left.wait(), TIMEOUT_SECONDS)
    assert bench.engine.aborted == []
    async with resumed(bench, id_, 2) as exchange:
        assert await begin(exchange) == id_
        tail = await events(exchange)
    repeated = {"last-event-id": f"{id_}:1"}
    async with Exchange(bench.app, path, BODIES[path], repeated) as exchange:
        await begin(exchange)
        assert await events(exchange) == tail
    whole = head + tail
    assert [number_of(event) for event in whole] == list(range(len(whole)))
    assert len(bench.engine.requests) == 1
    # Without the ids, it has the form of a stream that is not kept.
    async with bench.http() as http:
        plain = (await http.post(path, json=BODIES[path])).text.split("\n\n")[:-1]
    assert "\nid:" not in "\n" + "\n".join(plain)
    stripped = [event.partition(b"\n")[2].decode() for event in whole]
    assert [masked(event) for event in stripped] == [masked(event) for event in plain]


def masked(event: str) -> object:
    data = event.rpartition("data: ")[2].strip()
    return data if data == "[DONE]" else _masked(json.loads(data))


def _masked(value: Any) -> Any:
    """Leaves out ids and times."""
    if isinstance(value, dict):
        hidden = {"id", "created", "created_at", "completed_at", "item_id"}
        return {key: _masked(item) for key, item in value.items() if key not in hidden}
    return [_masked(item) for item in value] if isinstance(value, list) else value


async def test_a_client_reads_on_while_the_reply_is_made(bench: Bench) -> None:
    bench.engine.limit = 3
    async with Exchange(bench.app, CHAT, BODIES[CHAT], CONTINUE) as first:
        id_ = await begin(first)
        await events(first, 2)
        async with resumed(bench, id_, 0) as second:  # the server does not know yet that the first one is lost
            await begin(second)
            head = await events(second, 2)
            bench.engine.resume.set()
            tail = await events(second)
        lost = [await first.next_bytes() for _ in range(first.num_waiting)]
    assert len(lost) <= 2
    assert lost == (head + tail)[2 : 2 + len(lost)]
    assert [number_of(event) for event in head + tail] == list(range(len(head + tail)))
    assert tail[-1].endswith(b"data: [DONE]\n\n")
    found = samples(await scrape(bench))
    assert (found["jamba_kept_streams",], found["jamba_resumed_streams_total",]) == (1, 1)
    assert found["jamba_kept_stream_bytes",] > sum(map(len, head + tail))


async def test_a_reply_waits_while_nobody_reads_it(make_bench: MakeBench, ids: Ids) -> None:
    engine = FakeEngine(says(ids(" hello" * 60)), limit=3)
    bench = make_bench(engine=engine, kept_stream_bytes=2000)
    async with Exchange(bench.app, CHAT, BODIES[CHAT], CONTINUE) as exchange:
        id_ = await begin(exchange)
        await asyncio.wait_for(engine.stalled.wait(), TIMEOUT_SECONDS)
        exchange.disconnect()
        await until(lambda: bench.app.state.services.streams.find(id_, "").reader is None)
        start = len(await events(exchange, exchange.num_waiting))
        engine.limit = float("inf")
        engine.resume.set()
        for _ in range(200):
            await asyncio.sleep(0)
        assert engine.num_updates < 20
        assert bench.app.state.services.streams.num_bytes < 2600
        async with resumed(bench, id_, start) as again:
            await begin(again)
            rest = await events(again)
    assert [number_of(event) for event in rest] == list(range(start, start + len(rest)))
    assert rest[-1].endswith(b"data: [DONE]\n\n")
    assert len(rest) > 40
    async with resumed(bench, id_, start) as late:
        assert await late.status() == 410


async def test_nobody_comes_back(make_bench: MakeBench) -> None:
    bench = make_bench(resume_timeout=0.03)
    bench.engine.limit = 3
    async with Exchange(bench.app, CHAT, BODIES[CHAT], CONTINUE) as exchange:
        id_ = await begin(exchange)
        exchange.disconnect()
        await asyncio.wait_for(bench.engine.left.wait(), TIMEOUT_SECONDS)
    assert bench.engine.aborted == [bench.engine.requests[0].id]
    async with bench.http() as http:
        assert (await http.get(f"/v1/streams/{id_}")).status_code == 404
    found = samples(await scrape(bench))
    assert (found["jamba_kept_streams",], found["jamba_expired_streams_total",]) == (0, 1)
    assert found["jamba_aborted_requests_total", "disconnect"] == 1


async def test_a_client_ends_its_stream(bench: Bench) -> None:
    bench.engine.limit = 3
    async with Exchange(bench.app, CHAT, BODIES[CHAT], CONTINUE) as exchange, bench.http() as http:
        id_ = await begin(exchange)
        exchange.disconnect()
        reply = await http.delete(f"/v1/streams/{id_}")
        assert reply.json() == {"id": id_, "object": "stream", "deleted": True}
        await asyncio.wait_for(bench.engine.left.wait(), TIMEOUT_SECONDS)
        assert (await http.delete(f"/v1/streams/{id_}")).status_code == 404
    assert bench.engine.aborted == [bench.engine.requests[0].id]
    assert len(bench.app.state.services.streams) == 0


async def test_an_error_is_kept_too(bench: Bench) -> None:
    bench.engine.script = lambda request: iter([EngineDead("the engine is gone")])
    async with bench.http() as http:
        made = await http.post(CHAT, json=BODIES[CHAT], headers=CONTINUE)
        again = await http.get(f"/v1/streams/{made.headers['x-stream-id']}")
        head = await http.head(f"/v1/streams/{made.headers['x-stream-id']}")
    assert head.status_code == 405  # it would take the events away from the client that reads them
    assert "the engine is gone" in made.text
    assert again.text == made.text
    bench.engine.refusal = EngineDead("gone")
    async with bench.http() as http:
        assert (await http.post(CHAT, json=BODIES[CHAT], headers=CONTINUE)).status_code == 503
    assert len(bench.app.state.services.streams) == 1


async def test_the_shutdown_releases_everything(bench: Bench) -> None:
    async with bench.app.router.lifespan_context(bench.app):
        async with bench.http() as http:
            await http.post(CHAT, json=BODIES[CHAT], headers=CONTINUE)
        assert len(bench.app.state.services.streams) == 1
    assert len(bench.app.state.services.streams) == 0


async def test_a_stream_belongs_to_its_key(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("mine", "other"))
    mine, other = ({"x-api-key": name} for name in ("mine", "other"))
    async with bench.http() as http:
        made = await http.post(CHAT, json=BODIES[CHAT], headers=CONTINUE | mine)
        url = f"/v1/streams/{made.headers['x-stream-id']}"
        assert (await http.get(url, headers=mine)).text == made.text
        last = {"last-event-id": f"{made.headers['x-stream-id']}:0"}
        refused = [
            await http.get(url, headers=other),
            await http.delete(url, headers=other),
            await http.post(CHAT, json=BODIES[CHAT], headers=last | other),
        ]
        assert [reply.status_code for reply in refused] == [404] * 3
        assert {reply.json()["error"]["code"] for reply in refused} == {"stream_not_found"}
        assert (await http.get(url, headers=mine)).status_code == 200


async def test_a_request_that_goes_on_counts_as_running(make_bench: MakeBench, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text('{"key": "one", "max_concurrent": 1}\n')
    bench = make_bench(api_key_file=str(tmp_path / "keys"))
    bench.engine.limit = 3
    key = {"x-api-key": "one"}
    async with Exchange(bench.app, CHAT, BODIES[CHAT], CONTINUE | key) as exchange, bench.http() as http:
        id_ = await begin(exchange)
        exchange.disconnect()
        assert (await http.post(CHAT, json=chat(), headers=key)).status_code == 429
        bench.engine.resume.set()
        headers = {"content-type": "application/json", **key, "last-event-id": f"{id_}:0"}
        again = await http.post(CHAT, content=json.dumps(BODIES[CHAT]), headers=headers)
        assert again.text.endswith("data: [DONE]\n\n")
        await until(lambda: bench.engine.left.is_set())
    async with bench.http() as http:
        assert (await http.post(CHAT, json=chat(), headers=key)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "stream", "status", "message"),
    [
        ({"x-on-disconnect": "pause"}, True, 400, "X-On-Disconnect is 'pause'; it must be abort or continue"),
        (CONTINUE, False, 400, "needs stream: true"),
        ({"last-event-id": "7"}, True, 400, "Last-Event-ID is '7'"),
        ({"last-event-id": "chatcmpl-1:7"}, True, 404, "No stream with the id 'chatcmpl-1'"),
    ],
)
async def test_headers_that_cannot_be_honoured(
    bench: Bench, headers: dict[str, str], stream: bool, status: int, message: str
) -> None:
    async with bench.http() as http:
        reply = await http.post(CHAT, json=chat(stream=stream), headers=headers)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text
    assert bench.engine.requests == []


async def test_only_the_same_request_is_resumed(bench: Bench) -> None:
    async with bench.http() as http:
        made = await http.post(CHAT, json=BODIES[CHAT], headers=CONTINUE)
        last = {"last-event-id": f"{made.headers['x-stream-id']}:0"}
        body = await http.post(CHAT, json=chat(stream=True, seed=1), headers=last)
        path = await http.post("/v1/completions", json=BODIES[CHAT], headers=last)
        beyond = await http.get(f"/v1/streams/{made.headers['x-stream-id']}?from=99")
    assert (body.status_code, path.status_code, beyond.status_code) == (400, 404, 400)
    assert "its body is not that of the request" in body.json()["error"]["message"]


async def test_openais_client_reads_a_response_on(bench: Bench) -> None:
    async with bench.openai() as client:
        stream = await client.responses.create(model="jamba", input="Hi", stream=True, extra_headers=CONTINUE)
        made: list[Any] = [event async for event in stream]
        id_ = made[0].response.id
        again: list[Any] = [event async for event in await client.responses.retrieve(id_, stream=True)]
        after = await client.responses.retrieve(id_, stream=True, starting_after=3)
        assert again == made
        assert [event async for event in after] == made[4:]


async def test_the_real_server_closes_the_connection_that_was_replaced(bench: Bench) -> None:
    engine = bench.engine
    engine.limit = 3
    async with (
        edge_server(bench) as (_, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", CHAT, json=BODIES[CHAT], headers=CONTINUE) as first,
    ):
        lines = first.aiter_lines()
        head = [await anext(lines) for _ in range(4)]
        again = asyncio.create_task(http.get(f"/v1/streams/{first.headers['x-stream-id']}"))
        with pytest.raises(httpx.HTTPError):
            async for _ in lines:
                pass
        engine.resume.set()
        text = (await again).text
    assert text.startswith("\n".join(head))
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == HELLO.strip()
