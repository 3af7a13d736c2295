"""Streams: what comes in which order, and that it adds up to the reply that is not streamed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from jamba_server.engine.errors import EngineDead, EngineFailed, Overloaded
from jamba_server.engine.types import Request, TokenUpdate
from tests.server.asgi import Exchange
from tests.server.conftest import HELLO, Bench, Ids, MakeBench, chat
from tests.server.fake_engine import NUM_CACHED, Event, FakeEngine, says

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXTS = (" hello the world", " 漢字 and € 😀!", " the STOP STOPS here", "")


def events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def stream(bench: Bench, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with bench.http() as http:
        response = await http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    return events(response.text)


async def test_order_of_a_chat_stream(bench: Bench) -> None:
    chunks = await stream(bench, CHAT, chat(n=2))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(choice["delta"]) == {"content"} for choice in choices[1:-1])
        assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
        assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
        assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == HELLO.strip()
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:2]] == ["assistant"] * 2


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_include_usage(bench: Bench, path: str) -> None:
    body = chat() if path == CHAT else {"prompt": "Hi"}
    *chunks, last = await stream(bench, path, {**body, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(bench.engine.requests[0].prompt)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": NUM_CACHED}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_continuous_usage(bench: Bench, path: str) -> None:
    body = chat() if path == CHAT else {"prompt": "Hi"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(bench, path, {**body, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-2] == counts[-1]
    # it is a way to include the usage, and nothing without that
    chunks = await stream(bench, path, {**body, "stream_options": options | {"include_usage": False}})
    assert all("usage" not in chunk for chunk in chunks)


async def test_the_openai_client_reads_a_stream(bench: Bench) -> None:
    async with bench.openai() as client:
        chunks = await client.chat.completions.create(
            model="jamba",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        received = [chunk async for chunk in chunks]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices) == HELLO.strip()
    assert received[-1].usage is not None


def by_index(chunks: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    choices: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in chunks:
        choices[chunk["choices"][0]["index"]].append(chunk["choices"][0])
    return choices


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "fields", [{}, {"stop": ["STOPS", "OP", "😀!"]}, {"max_tokens": 9}, {"min_tokens": 20, "stop": "S"}]
)
async def test_a_chat_stream_equals_the_whole_reply(bench: Bench, ids: Ids, text: str, fields: dict[str, Any]) -> None:
    bench.engine.script = says(ids(text), ids(text[::-1]))
    body = chat(n=2, logprobs=True, top_logprobs=1, **fields)
    async with bench.http() as http:
        whole = (await http.post(CHAT, json=body)).json()
    streamed = by_index(await stream(bench, CHAT, body))
    for choice in whole["choices"]:
        parts = streamed[choice["index"]]
        assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
        scores = [entry for p in parts if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 2}, {"logprobs": 0, "stop": "OP"}])
async def test_a_completion_stream_equals_the_whole_reply(
    bench: Bench, ids: Ids, text: str, fields: dict[str, Any]
) -> None:
    bench.engine.script = says(ids(text))
    body = {"prompt": ["hello", "the € world"], "n": 2, "max_tokens": 40, **fields}
    async with bench.http() as http:
        whole = (await http.post(COMPLETIONS, json=body)).json()
    streamed = by_index(await stream(bench, COMPLETIONS, body))
    assert len(whole["choices"]) == 4
    for choice in whole["choices"]:
        parts = streamed[choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if choice["logprobs"] else ():
            assert [x for part in parts for x in part["logprobs"][key]] == choice["logprobs"][key]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 40}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "model": "jamba"}),
    ],
)
async def test_no_event_contains_a_character_at_which_clients_end_lines(
    bench: Bench, ids: Ids, path: str, body: dict[str, Any]
) -> None:
    """`httpx.Response.iter_lines`, on which client libraries build, ends lines as `str.splitlines` does."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    bench.engine.script = says(ids(text))
    async with bench.http() as http:
        reply = await http.post(path, json={**body, "stream": True})
        assert reply.text.splitlines() == reply.text.split("\n")[:-1]
        received = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]
    pieces = {
        CHAT: lambda e: e["choices"][0]["delta"].get("content", ""),
        COMPLETIONS: lambda e: e["choices"][0]["text"],
        "/v1/responses": lambda e: e["delta"] if e["type"] == "response.output_text.delta" else "",
        "/v1/messages": lambda e: e["delta"].get("text", "") if e["type"] == "content_block_delta" else "",
    }
    assert "".join(map(pieces[path], received)) == text


async def test_half_a_character_never_leaves(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids("€€"))
    chunks = await stream(bench, COMPLETIONS, {"prompt": "x"})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["€", "€", ""]


async def test_text_that_could_begin_a_stop_string_waits(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids("abcSTx"))
    chunks = await stream(bench, COMPLETIONS, {"prompt": "x", "stop": "STOP"})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c", "STx", ""]


def fails_after(updates: list[Event]) -> Any:
    def script(request: Request) -> Iterator[Event]:
        for update in updates:
            if isinstance(update, TokenUpdate):
                yield TokenUpdate(request_id=request.id, token_ids=update.token_ids)
            else:
                yield update

    return script


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFailed("It ended the engine."), "engine_failed"),
        (EngineDead("gone"), "engine_dead"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
)
async def test_an_error_within_a_stream_is_its_last_event(
    bench: Bench, error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.engine.script = fails_after([TokenUpdate(request_id="", token_ids=[1900]), error])
    *_, last = await stream(bench, CHAT, chat())
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert last["error"]["request_id"]
    assert "secret" not in json.dumps(last)
    assert ("ZeroDivisionError" in caplog.text) == (code == "internal_error")


async def test_a_failed_update_is_an_error(bench: Bench) -> None:
    def script(request: Request) -> Iterator[Event]:
        yield TokenUpdate(request_id=request.id, finish_reason="error", error="NaN logits")

    bench.engine.script = script
    *_, last = await stream(bench, CHAT, chat())
    assert (last["error"]["code"], last["error"]["message"]) == ("engine_failed", "NaN logits")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_full_queue_is_an_ordinary_error_for_a_stream_too(bench: Bench, path: str) -> None:
    bench.engine.refusal = Overloaded("full", retry_after=7)
    body = chat() if path == CHAT else {"prompt": "Hi"}
    async with bench.http() as http:
        response = await http.post(path, json={**body, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_waiting_stream_begins_at_once_and_is_kept_alive(
    make_bench: MakeBench, engine: FakeEngine, path: str
) -> None:
    engine.limit = 0
    bench = make_bench(sse_keep_alive=0.001)
    body = chat(stream=True) if path == CHAT else {"prompt": "Hi", "stream": True}
    async with Exchange(bench.app, path, body) as exchange:
        assert await exchange.status() == 200
        if path == CHAT:
            assert b'"role":"assistant"' in await exchange.next_bytes()
        assert [await exchange.next_bytes() for _ in range(3)] == [b": keep-alive\n\n"] * 3
        engine.limit = 10_000
        engine.resume.set()
        rest = b""
        while not rest.endswith(b"data: [DONE]\n\n"):
            rest += await exchange.next_bytes()
    assert [e["choices"][0]["finish_reason"] for e in events(rest.decode())][-1] == "stop"
    assert engine.aborted == []
