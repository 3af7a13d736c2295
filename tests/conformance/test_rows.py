"""Every field of every request changes what it should, through the official clients, streamed as well as not."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from tests.conformance.apis import Api
from tests.conformance.rows import HELLO, Body, Inert, Refused, Row, met
from tests.conformance.served import Served
from tests.conformance.tables import TABLES, Table


def _cases(kind: str) -> list[Any]:
    return [
        pytest.param(table, row, id=f"{table.name}-{row}-{number}")
        for table in TABLES
        for number, row in enumerate(getattr(table, kind))
    ]


@pytest.mark.parametrize(("table", "row"), _cases("rows"))
async def test_a_field_changes_what_it_should(table: Table, row: Row, served: dict[str, Served]) -> None:
    model = served[row.model]
    api = model.api(table.api)
    body, base = {**api.example, **row.base, **row.body}, {**api.example, **row.base}
    other = await _observed(api, model, row.says, base, stream=not row.unstreamed)
    found = await _observed(api, model, row.says, body, stream=not row.unstreamed)
    for part in ("engine", "reply", "headers"):
        value, before = getattr(found, part), getattr(other, part)
        for path, expected in getattr(row, part).items():
            assert met(path, expected, value, before), (part, path, value)
            assert not met(path, expected, before, before), f"{path} has this value without {row.field}, too"
    if row.prompt:
        assert row.prompt in found.prompt
        assert row.prompt not in other.prompt, f"the prompt has this text without {row.field}, too"
    assert row.engine or row.reply or row.prompt or row.headers, "the row expects nothing"
    if row.streamed and row.unstreamed:
        streamed = await _observed(api, model, row.says, body, stream=True)
        assert api.same(streamed.reply) == api.same(found.reply)
        assert streamed.engine == found.engine
    # The first request has changed the session, so a later count of its tokens would differ.
    if api.count_path and row.unstreamed and row.field != "session":
        await _check_count(table, api, body, found.engine[0]["prompt"])


async def _check_count(table: Table, api: Api, body: Body, prompt: list[int]) -> None:
    """Checks that the endpoint which counts or shows the tokens of a prompt takes the same request, and reports the
    tokens that the engine got."""
    counted = await api.http.post(api.count_path, json=table.for_count(body))
    assert counted.status_code == 200, counted.text
    reply = counted.json()
    assert reply[api.counted] == len(prompt)
    assert reply.get("token_ids", prompt) == prompt


@dataclass(frozen=True)
class _Observed:
    """The engine's requests, the reply and its headers for one HTTP request. `prompt` is the text of the prompt of the
    engine's first request."""

    engine: list[dict[str, Any]]
    reply: dict[str, Any]
    headers: dict[str, str]
    prompt: str


async def _observed(api: Api, model: Served, says: tuple[str, ...], body: Body, *, stream: bool) -> _Observed:
    model.say(*says)
    answer = await (api.stream(body) if stream else api.call(body))
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return _Observed(_engine_requests(model), answer.reply, headers, model.prompt())


def _engine_requests(model: Served) -> list[dict[str, Any]]:
    """Returns the engine's requests, without their ids."""
    requests: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(model.engine.requests))
    return [
        {key: value for key, value in request.items() if key not in ("id", "parent", "group")} for request in requests
    ]


@pytest.mark.parametrize(("table", "row"), _cases("inert"))
async def test_a_field_without_effect(table: Table, row: Inert, served: dict[str, Served]) -> None:
    model = served["jamba"]
    api = model.api(table.api)
    base = {**api.example, **row.base}
    for stream in (False, True) if row.unstreamed else (True,):
        other = await _observed(api, model, HELLO, base, stream=stream)
        found = await _observed(api, model, HELLO, {**base, **row.body}, stream=stream)
        assert found.engine == other.engine
        kept = table.echoed & row.body.keys()
        for name in kept:
            assert found.reply[name] == row.body[name]
        assert _rest(api.same(found.reply), kept) == _rest(api.same(other.reply), kept)


def _rest(reply: dict[str, Any], without: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in reply.items() if name not in without}


@pytest.mark.parametrize(("table", "row"), _cases("refused"))
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_field(table: Table, row: Refused, stream: bool, served: dict[str, Served]) -> None:
    model = served["jamba"]
    api = model.api(table.api)
    model.say("hello")
    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as error:
        await (api.stream if stream else api.call)({**api.example, **row.body})
    told = error.value.body
    assert isinstance(told, dict)
    param = row.param or row.field
    if isinstance(error.value, openai.BadRequestError):
        assert told["param"] == param
    else:
        assert param in told["error"]["message"]
    assert not model.engine.requests
    assert len(error.value.response.content) <= 1024
