"""The endpoints that generate nothing: models, tokens, and the responses that are stored."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Model
from openai.types.responses import Response

from tests.conformance import chat_rows, other_rows
from tests.conformance.apis import ResponseApi
from tests.conformance.other_rows import TOKENIZE
from tests.conformance.rows import Inert, Refused, Row, met
from tests.conformance.served import Served
from tests.conformance.strict import check


def _client(model: Served) -> AsyncOpenAI:
    api = model.api(ResponseApi)
    assert isinstance(api, ResponseApi)
    return api.client


# /tokenize and /detokenize --------------------------------------------------------------------------------------------


async def _tokenized(model: Served, body: dict[str, Any]) -> dict[str, Any]:
    reply = await model.api(ResponseApi).http.post("/tokenize", json=body)
    assert reply.status_code == 200, reply.text
    tokens = reply.json()["tokens"]
    prompt = await model.api(ResponseApi).http.post("/detokenize", json={"tokens": tokens})
    return {
        "reply": reply.json(),
        "headers": {name.lower(): value for name, value in reply.headers.items()},
        "prompt": prompt.json()["prompt"],
    }


@pytest.mark.parametrize("row", TOKENIZE, ids=str)
async def test_a_field_of_tokenize(row: Row, served: dict[str, Served]) -> None:
    model = served[row.model]
    other = await _tokenized(model, dict(row.base))
    found = await _tokenized(model, {**row.base, **row.body})
    assert found["reply"] != other["reply"] or found["headers"] != other["headers"]
    if row.prompt:
        assert row.prompt in found["prompt"]
        assert row.prompt not in other["prompt"]
    for part in ("reply", "headers"):
        for path, expected in getattr(row, part).items():
            assert met(path, expected, found[part], other[part])


@pytest.mark.parametrize("row", chat_rows.INERT_MESSAGES, ids=str)
async def test_a_field_of_tokenize_without_effect(row: Inert, served: dict[str, Served]) -> None:
    model = served["jamba"]
    replies = [await _tokenized(model, body) for body in (dict(row.base), {**row.base, **row.body})]
    assert replies[0]["reply"] == replies[1]["reply"]


@pytest.mark.parametrize("row", chat_rows.REFUSED_MESSAGES, ids=str)
async def test_a_refused_field_of_tokenize(row: Refused, served: dict[str, Served]) -> None:
    reply = await served["jamba"].api(ResponseApi).http.post("/tokenize", json=dict(row.body))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == row.param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", other_rows.PROMPT), ("/detokenize", {"tokens": [5]})])
async def test_a_model_that_is_not_served(path: str, body: dict[str, Any], served: dict[str, Served]) -> None:
    http = served["jamba"].api(ResponseApi).http
    assert (await http.post(path, json={**body, "model": "alias"})).status_code == 200
    assert (await http.post(path, json={**body, "model": "other"})).status_code == 404


# Models ---------------------------------------------------------------------------------------------------------------


async def test_the_models(served: dict[str, Served]) -> None:
    client = _client(served["jamba"])
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["jamba", "alias"]
    for model in listed:
        check(Model, model.to_json())
        assert await client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


# Stored responses -----------------------------------------------------------------------------------------------------


async def test_a_chain_of_stored_responses(served: dict[str, Served]) -> None:
    model = served["jamba"]
    client = _client(model)
    model.say(" hello")
    first = await client.responses.create(model="jamba", input="one")
    second = await client.responses.create(model="jamba", input="two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = await client.responses.create(model="jamba", input="three", previous_response_id=second.id)
    turns = [f"<|user|> {text}<|eom|><|bom|><|assistant|>" for text in ("one", "two", "three")]
    prompt = model.tokenizer.decode(model.engine.requests[-1].prompt, skip_special_tokens=False)
    assert prompt.endswith("<|eom|><|bom|>".join(f"{turn} hello" for turn in turns).removesuffix(" hello"))
    raw = await client.responses.with_raw_response.retrieve(third.id)
    check(Response, raw.text)
    assert json.loads(raw.text) == json.loads(third.to_json())
    await client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="jamba", input="four", previous_response_id=third.id)
    assert error.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(first.id)


async def test_the_input_items(served: dict[str, Served]) -> None:
    model = served["jamba"]
    client = _client(model)
    model.say(" hello")
    texts = ["a", "b", "c"]
    items: Any = [{"role": "user", "content": text} for text in texts]
    made = await client.responses.create(model="jamba", input=items)

    async def listed(**query: Any) -> list[str]:
        page = await client.responses.input_items.list(made.id, **query)
        return [item.content[0].text async for item in page]  # type: ignore[union-attr]

    assert await listed() == texts[::-1]
    assert await listed(order="asc") == texts
    assert await listed(order="asc", limit=1) == texts  # the client reads page after page
    page = await client.responses.input_items.list(made.id, order="asc", limit=2)
    assert page.has_more
    assert [item.content[0].text for item in page.data] == ["a", "b"]  # type: ignore[union-attr]
    assert page.data[-1].id is not None
    assert await listed(order="asc", after=page.data[-1].id) == ["c"]


@pytest.mark.parametrize("query", [{"stream": "true"}, {"stream": "perhaps"}])
async def test_the_events_of_a_stored_response_are_gone(query: dict[str, str], served: dict[str, Served]) -> None:
    model = served["jamba"]
    model.say(" hello")
    made = await _client(model).responses.create(model="jamba", input="one")
    reply = await model.api(ResponseApi).http.get(f"/v1/responses/{made.id}", params=query)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "stream"


async def test_the_other_pages_exist(served: dict[str, Served]) -> None:
    http = served["jamba"].api(ResponseApi).http
    assert (await http.get("/api/hello")).json() == {"message": "hello"}
    assert (await http.get("/tokenizer_info")).json()["eos_token"] == "<|endoftext|>"
