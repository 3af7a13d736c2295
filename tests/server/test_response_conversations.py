"""Responses that are stored: continued, read, listed and deleted, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.asgi import Exchange
from tests.server.conftest import TEMPLATE, Bench, Ids, MakeBench
from tests.server.fake_engine import says

TURN = "<|bom|><|user|> {}<|eom|><|bom|><|assistant|> hello the world<|eom|>"


def prompt(bench: Bench, tokenizer: Tokenizer, number: int = -1) -> str:
    return tokenizer.decode(bench.engine.requests[number].prompt, skip_special_tokens=False)


async def test_a_response_continues_another(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.openai() as client:
        first = await client.responses.create(model="jamba", input="a", instructions="be kind")
        second = await client.responses.create(model="jamba", input="b", previous_response_id=first.id)
        third = await client.responses.create(
            model="jamba", input="c", previous_response_id=second.id, instructions="be brief"
        )
        fork = await client.responses.create(model="jamba", input="d", previous_response_id=first.id)
    assert prompt(bench, tokenizer, 1).startswith(f"<|startoftext|>{TURN.format('a')}<|bom|><|user|> b")
    expected = f"<|bom|><|system|> be brief<|eom|>{TURN.format('a')}{TURN.format('b')}<|bom|><|user|> c"
    assert prompt(bench, tokenizer, 2).startswith(f"<|startoftext|>{expected}")
    assert prompt(bench, tokenizer, 3).startswith(f"<|startoftext|>{TURN.format('a')}<|bom|><|user|> d")
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    assert len({first.id, second.id, third.id, fork.id}) == 4


async def test_a_streamed_response_can_be_continued_at_once(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.openai() as client:
        stream = await client.responses.create(model="jamba", input="a", stream=True)
        async for event in stream:
            if event.type == "response.completed":
                await client.responses.create(model="jamba", input="b", previous_response_id=event.response.id)
    assert prompt(bench, tokenizer).startswith(f"<|startoftext|>{TURN.format('a')}<|bom|><|user|> b")


async def test_the_items_of_a_reply_are_input_for_the_next_request(bench: Bench, tokenizer: Tokenizer) -> None:
    """Without the store: the client sends the whole conversation, with the items as it got them."""
    async with bench.openai() as client:
        first = await client.responses.create(model="jamba", input="a", store=False)
        items: list[Any] = [{"role": "user", "content": "a"}]
        items += [item.model_dump() for item in first.output]
        await client.responses.create(model="jamba", input=[*items, {"role": "user", "content": "b"}], store=False)
    assert prompt(bench, tokenizer).startswith(f"<|startoftext|>{TURN.format('a')}<|bom|><|user|> b")


async def test_references_are_replaced_by_their_items(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.openai() as client:
        first = await client.responses.create(model="jamba", input=[{"id": "msg_mine", "role": "user", "content": "a"}])  # pyright: ignore[reportArgumentType]
        await client.responses.create(
            model="jamba",
            input=[
                {"id": "msg_mine"},
                {"type": "item_reference", "id": first.output[0].id or ""},
                {"role": "user", "content": "b"},
            ],
        )
    assert prompt(bench, tokenizer).startswith(f"<|startoftext|>{TURN.format('a')}<|bom|><|user|> b")


async def test_a_stored_response_is_read_and_deleted(bench: Bench) -> None:
    async with bench.openai() as client:
        made = await client.responses.create(model="jamba", input="a", metadata={"k": "v"})
        read = await client.responses.retrieve(made.id)
        assert read.to_dict() == made.to_dict()
        assert (read.metadata, getattr(read, "store", None)) == ({"k": "v"}, True)
        await client.responses.delete(made.id)
        for attempt in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="is stored") as caught:
                await attempt(made.id)
            assert caught.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError):
            await client.responses.input_items.list(made.id)


async def test_the_reply_to_a_deletion(bench: Bench) -> None:
    async with bench.http() as http:
        made = (await http.post("/v1/responses", json={"input": "a"})).json()
        reply = await http.delete(f"/v1/responses/{made['id']}")
    assert reply.json() == {"id": made["id"], "object": "response", "deleted": True}


async def test_a_response_that_is_not_to_be_stored(bench: Bench) -> None:
    async with bench.openai() as client:
        made = await client.responses.create(model="jamba", input="a", store=False)
        assert getattr(made, "store", None) is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError, match="is not stored") as caught:
            await client.responses.create(model="jamba", input="b", previous_response_id=made.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_only_background_responses_can_be_cancelled(bench: Bench) -> None:
    async with bench.openai() as client:
        made = await client.responses.create(model="jamba", input="a")
        with pytest.raises(openai.BadRequestError, match="Only a background response"):
            await client.responses.cancel(made.id)
        with pytest.raises(openai.BadRequestError, match="stream is true"):
            await client.responses.retrieve(made.id, stream=True)


async def test_input_items_come_in_pages(bench: Bench) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(25)]
    items += [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "18C"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"role": "assistant", "content": "x"},
    ]
    async with bench.openai() as client:
        made = await client.responses.create(model="jamba", input=items)  # pyright: ignore[reportArgumentType]
        first = await client.responses.input_items.list(made.id)
        everything = [item async for item in client.responses.input_items.list(made.id, order="asc", limit=7)]
        backwards = [item async for item in client.responses.input_items.list(made.id, limit=7)]
        rest = await client.responses.input_items.list(made.id, order="asc", after=everything[26].id or "")
        none = await client.responses.input_items.list(made.id, order="asc", after=everything[-1].id or "")
        with pytest.raises(openai.BadRequestError, match="no input item with the id 'x'"):
            await client.responses.input_items.list(made.id, after="x")
        with pytest.raises(openai.BadRequestError, match="limit is"):
            await client.responses.input_items.list(made.id, limit=101)
    assert len(first.data) == 20
    assert first.has_more
    assert [item.type for item in everything] == [item.get("type", "message") for item in items]
    assert [item.id for item in backwards] == [item.id for item in reversed(everything)]
    assert first.data[0].id == everything[-1].id
    texts = [item.content[0].text for item in everything[:25] if item.type == "message"]  # pyright: ignore
    assert texts == [str(number) for number in range(25)]
    assert [item.id for item in rest.data] == [item.id for item in everything[27:]]
    assert not rest.has_more
    assert (none.data, none.has_more) == ([], False)


KEYS: Any = ("one", "two")


def as_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_sees_only_its_own_responses(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=KEYS)
    async with bench.http() as http:
        item = {"id": "msg_mine", "role": "user", "content": "secret"}
        made = (await http.post("/v1/responses", json={"input": [item]}, headers=as_key("one"))).json()
        path = f"/v1/responses/{made['id']}"
        for key, status in (("two", 404), ("one", 200)):
            replies: list[httpx.Response] = [
                await http.get(path, headers=as_key(key)),
                await http.get(f"{path}/input_items", headers=as_key(key)),
            ]
            assert [reply.status_code for reply in replies] == [status] * 2
            continued = {"input": "b", "previous_response_id": made["id"]}
            reply = await http.post("/v1/responses", json=continued, headers=as_key(key))
            assert reply.status_code == (200 if status == 200 else 400)
            reply = await http.post("/v1/responses", json={"input": [{"id": "msg_mine"}]}, headers=as_key(key))
            assert reply.status_code == (200 if status == 200 else 400)
        assert (await http.delete(path, headers=as_key("two"))).status_code == 404
        assert (await http.post(f"{path}/cancel", json={}, headers=as_key("two"))).status_code == 404
        assert (await http.get(path)).status_code == 401
        assert (await http.delete(path, headers=as_key("one"))).status_code == 200


async def test_a_restart_keeps_responses_with_their_keys(make_bench: MakeBench, tmp_path: Path) -> None:
    # The folder of files is locked until a server ends, and here the first one stays in memory.
    async with make_bench(api_key=KEYS, data_dir=str(tmp_path), max_file_bytes=0).http() as http:
        made = (await http.post("/v1/responses", json={"input": "a"}, headers=as_key("one"))).json()
    restarted = make_bench(api_key=(*KEYS, "new"), data_dir=str(tmp_path), max_file_bytes=0)
    async with restarted.http() as http:
        path = f"/v1/responses/{made['id']}"
        statuses = [(await http.get(path, headers=as_key(key))).status_code for key in ("one", "two", "new")]
        assert statuses == [200, 404, 404]
        assert (await http.get(path, headers=as_key("one"))).json() == made
        body = {"input": "b", "previous_response_id": made["id"]}
        assert (await http.post("/v1/responses", json=body, headers=as_key("one"))).status_code == 200


async def test_the_bounds_are_options(make_bench: MakeBench) -> None:
    async with make_bench(max_stored_responses=2).http() as http:
        made = [(await http.post("/v1/responses", json={"input": "a"})).json()["id"] for _ in range(3)]
        assert [(await http.get(f"/v1/responses/{id_}")).status_code for id_ in made] == [404, 200, 200]


async def test_a_server_without_a_store(make_bench: MakeBench) -> None:
    async with make_bench(max_stored_responses=0).http() as http:
        made = (await http.post("/v1/responses", json={"input": "a"})).json()
        assert made["store"] is False
        refused = await http.post("/v1/responses", json={"input": "a", "store": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "store")


async def test_a_response_too_large_to_store_says_so(make_bench: MakeBench) -> None:
    async with make_bench(max_stored_bytes=100).http() as http:
        reply = (await http.post("/v1/responses", json={"input": "a"})).json()
    assert (reply["status"], reply["store"]) == ("completed", False)


async def test_a_client_that_leaves_ends_the_generation(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello") * 20)
    bench.engine.limit = 3
    async with Exchange(bench.app, "/v1/responses", {"input": "a", "stream": True}) as exchange:
        assert await exchange.status() == 200
        assert b"response.created" in await exchange.next_bytes()
        await bench.engine.stalled.wait()
        exchange.disconnect()
        await bench.engine.left.wait()
    assert bench.engine.aborted == [bench.engine.requests[0].id]
    bench.engine.left.clear()
    bench.engine.stalled.clear()
    async with Exchange(bench.app, "/v1/responses", {"input": "a"}) as exchange:
        await bench.engine.stalled.wait()
        exchange.disconnect()
        await bench.engine.left.wait()


async def test_skipped_tools_and_unknown_fields_are_named(make_bench: MakeBench) -> None:
    bench = make_bench(template=TEMPLATE + "{% if tools %}{% endif %}")
    tools = [
        {"type": "function", "name": "f", "parameters": {"type": "object"}},
        {"type": "namespace", "name": "crm", "description": "d", "tools": [{"type": "function", "name": "find"}]},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "web_search", "external_web_access": True},
        {"type": "\nevil"},
    ]
    body = {"input": [{"role": "user", "content": "a", "mood": 1}], "tools": tools, "client_metadata": {"a": "b"}}
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-ignored-fields"] == "client_metadata, input.mood"
    assert reply.headers["x-warning"] == "the model does not see the tools of these types: custom, web_search, ?evil"
    assert reply.json()["tools"] == tools[:2]


async def test_reasoning_that_cannot_be_read_is_named(bench: Bench) -> None:
    reasoning = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAA=="}
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": [reasoning, {"role": "user", "content": "a"}]})
    assert reply.headers["x-warning"] == "the model does not see reasoning that another server has encrypted"
