"""/v1/responses through the official client: what a response has, and which events announce it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from jamba_server.engine.errors import EngineFailed
from jamba_server.engine.types import Request
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import HELLO, Bench, Ids
from tests.server.fake_engine import EOS, NUM_CACHED, Event, says, score

REPLY = "hello the world"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of which must be one of OpenAI's to the letter."""
    events: list[dict[str, Any]] = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_a_response(bench: Bench, ids: Ids) -> None:
    async with bench.openai() as client:
        response = await client.responses.create(model="jamba", input="Hi")
    assert response.output_text == REPLY
    assert (response.object, response.status, response.model, response.error) == (
        "response",
        "completed",
        "jamba",
        None,
    )
    assert response.id.startswith("resp_")
    [message] = response.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    assert message.id.startswith("msg_")
    usage = response.usage
    assert usage is not None
    [request] = bench.engine.requests
    assert (usage.input_tokens, usage.output_tokens) == (len(request.prompt), len(ids(HELLO)) + 1)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == NUM_CACHED
    assert usage.input_tokens_details.cache_write_tokens == usage.input_tokens - NUM_CACHED
    assert (response.temperature, response.top_p, response.tool_choice, response.tools) == (1, 1, "auto", [])


async def test_the_reply_is_openai_s_type_to_the_letter(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "Hi"})
    Response.model_validate_json(reply.content, strict=True)


async def test_the_events_of_a_text(bench: Bench) -> None:
    async with bench.http() as http:
        body = (await http.post("/v1/responses", json={"input": "Hi", "stream": True})).content
    created, in_progress, added, part, *deltas, text_done, part_done, item_done, completed = events_of(body)
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    assert created["response"]["status"] == "in_progress"
    assert (added["type"], added["item"]["content"]) == ("response.output_item.added", [])
    assert (part["type"], part["part"]["text"]) == ("response.content_part.added", "")
    assert {delta["type"] for delta in deltas} == {"response.output_text.delta"}
    assert len(deltas) > 1
    assert "".join(delta["delta"] for delta in deltas) == REPLY == text_done["text"] == part_done["part"]["text"]
    assert [e["type"].removeprefix("response.") for e in (text_done, part_done, item_done, completed)] == [
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert completed["response"]["output"] == [item_done["item"]]
    ids = {event["item_id"] for event in (part, *deltas, text_done, part_done)}
    assert ids == {added["item"]["id"], item_done["item"]["id"]}
    assert completed["response"]["id"] == created["response"]["id"]


async def test_the_client_s_own_stream(bench: Bench) -> None:
    """The client builds the response from the events, and fails if they come in another order."""
    async with bench.openai() as client, client.responses.stream(model="jamba", input="Hi") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == REPLY


async def test_a_stream_and_a_whole_reply_are_the_same(bench: Bench) -> None:
    body = {
        "input": "Hi",
        "seed": 1,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "metadata": {"a": "b"},
    }
    async with bench.http() as http:
        whole = (await http.post("/v1/responses", json=body)).json()
        streamed = events_of((await http.post("/v1/responses", json=body | {"stream": True})).content)[-1]["response"]
    for response in (whole, streamed):
        for name in ("id", "created_at", "completed_at"):
            del response[name]
        del response["output"][0]["id"]
    assert whole == streamed


async def test_logprobs(bench: Bench, ids: Ids, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": True}
        events = events_of((await http.post("/v1/responses", json=body)).content)
    tokens = [*ids(HELLO), EOS]
    [part] = events[-1]["response"]["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == [tokenizer.token_text(t) for t in tokens]
    assert [entry["logprob"] for entry in part["logprobs"]] == [score(t, 0).logprob for t in tokens]
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2] * len(tokens)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == part["logprobs"]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == part["logprobs"]


async def test_a_reply_that_reached_its_limit_is_incomplete(bench: Bench) -> None:
    async with bench.openai() as client:
        response = await client.responses.create(model="jamba", input="Hi", max_output_tokens=1)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        [message] = response.output
        assert message.type == "message"
        assert message.status == "incomplete"
        stream = await client.responses.create(model="jamba", input="Hi", max_output_tokens=1, stream=True)
        *_, last = [event async for event in stream]
    assert last.type == "response.incomplete"
    assert last.response.output_text == "hello"


async def test_an_empty_reply_has_a_message(bench: Bench) -> None:
    bench.engine.script = says([])
    async with bench.http() as http:
        events = events_of((await http.post("/v1/responses", json={"input": "Hi", "stream": True})).content)
    [message] = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == ""


async def test_an_engine_that_fails_in_the_middle_of_a_stream(bench: Bench, ids: Ids) -> None:
    whole = says(ids(HELLO))

    def script(request: Request) -> Iterator[Event]:
        yield next(iter(whole(request)))
        yield EngineFailed("The engine died twice.")

    bench.engine.script = script
    async with bench.http() as http:
        events = events_of((await http.post("/v1/responses", json={"input": "Hi", "stream": True})).content)
        last = events[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert "died twice" in last["response"]["error"]["message"]
        assert last["response"]["output"][0]["content"][0]["text"] == "hello"
        assert (await http.get(f"/v1/responses/{last['response']['id']}")).status_code == 404
        whole_reply = await http.post("/v1/responses", json={"input": "Hi"})
    assert whole_reply.status_code == 500


async def test_the_openapi_document_has_the_stream(bench: Bench) -> None:
    async with bench.http() as http:
        document = (await http.get("/openapi.json")).json()
    replies = document["paths"]["/v1/responses"]["post"]["responses"]
    assert replies["200"]["content"].keys() == {"application/json", "text/event-stream"}
