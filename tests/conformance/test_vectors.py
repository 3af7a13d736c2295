"""Every field of the requests for vectors changes what it should, has no effect, or is refused by its name."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai.types import CreateEmbeddingResponse

from jamba_server.engine.types import EngineInfo
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.conformance.rows import Inert, Refused, Row, met
from tests.conformance.served import TEMPLATE
from tests.conformance.strict import check
from tests.conformance.vector_rows import HI, VECTOR_TABLES, Model, VectorTable
from tests.server.asgi import TIMEOUT_SECONDS, Exchange
from tests.server.conftest import Bench
from tests.server.fake_engine import INFO, FakeEngine, says
from tests.synthetic_tokenizer import write_tokenizer


class VectorEngine(FakeEngine):
    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__(says([]))
        self._labels = labels

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(INFO, labels=self._labels, max_model_len=8192)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Model, Bench]:
    folder: Path = tmp_path_factory.mktemp("vectors")
    write_tokenizer(folder, "jamba-1.5")
    tokenizer = Tokenizer.from_folder(folder)
    config = ServerConfig(served_model_name=("jamba", "alias"), enable_priority=True)
    engines: dict[Model, FakeEngine] = {"text": VectorEngine(()), "scores": VectorEngine(("LABEL_0",))}
    defaults, template = GenerationDefaults(), ChatTemplate(TEMPLATE, tokenizer)
    return {
        name: Bench(create_app(config, engine, tokenizer, template, defaults, demo=False), engine)
        for name, engine in engines.items()
    }


async def observed(model: Bench, path: str, body: dict[str, Any]) -> tuple[httpx.Response, Any]:
    """The reply, and what the engine was asked for, without ids."""
    model.engine.requests.clear()
    async with model.http() as http:
        reply = await http.post(path, json=body)
    asked = [
        msgspec.to_builtins(msgspec.structs.replace(request, id="", parent="")) for request in model.engine.requests
    ]
    return reply, [{"pooling": "last", "cache_salt": "", "priority": 0, "targets": []} | request for request in asked]


def cases(kind: str) -> list[Any]:
    return [
        pytest.param(table, row, id=f"{table.path}-{row}-{number}")
        for table in VECTOR_TABLES
        for number, row in enumerate(getattr(table, kind))
    ]


def without_ids(reply: Any) -> Any:
    return {name: value for name, value in reply.items() if name not in ("id", "created")}


@pytest.mark.parametrize(("table", "row"), cases("rows"))
async def test_a_field_changes_what_it_should(table: VectorTable, row: Row, models: dict[Model, Bench]) -> None:
    model = models[table.model]
    base = {**table.example, **row.base}
    other, before = await observed(model, table.path, base)
    found, asked = await observed(model, table.path, {**base, **row.body})
    assert other.status_code == found.status_code == 200, (other.text, found.text)
    for path, expected in row.engine.items():
        assert met(path, expected, asked, before), (path, asked)
        assert not met(path, expected, before, before)
    for path, expected in row.reply.items():
        assert met(path, expected, found.json(), other.json()), (path, found.text)
        assert not met(path, expected, other.json(), other.json())
    if row.prompt:
        tokenizer = model.app.state.services.tokenizer
        texts = [tokenizer.decode(each[0]["prompt"], skip_special_tokens=False) for each in (asked, before)]
        assert row.prompt in texts[0]
        assert row.prompt not in texts[1]
    assert row.engine or row.reply or row.prompt


@pytest.mark.parametrize(("table", "row"), cases("inert"))
async def test_a_field_without_effect(table: VectorTable, row: Inert, models: dict[Model, Bench]) -> None:
    base = {**table.example, **row.base}
    other, before = await observed(models[table.model], table.path, base)
    found, asked = await observed(models[table.model], table.path, {**base, **row.body})
    assert found.status_code == 200, found.text
    assert "X-Ignored-Fields" not in found.headers
    assert (asked, without_ids(found.json())) == (before, without_ids(other.json()))


@pytest.mark.parametrize(("table", "row"), cases("refused"))
async def test_a_refused_field(table: VectorTable, row: Refused, models: dict[Model, Bench]) -> None:
    reply, asked = await observed(models[table.model], table.path, {**table.example, **row.body})
    assert (reply.status_code, asked) == (400, []), reply.text
    assert reply.json()["error"]["param"] == (row.param or row.field)


@pytest.mark.parametrize("table", VECTOR_TABLES, ids=lambda table: table.path)
async def test_unknown_fields(table: VectorTable, models: dict[Model, Bench]) -> None:
    """A misspelling is refused by its name. What is no field at all is named in a header, or refused if configured."""
    model = models[table.model]
    reply, _ = await observed(model, table.path, {**table.example, "cache_sal": "a"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "cache_sal")
    reply, _ = await observed(model, table.path, {**table.example, "nonsense": 1})
    assert (reply.status_code, reply.headers["X-Ignored-Fields"]) == (200, "nonsense")
    services = model.app.state.services
    model.app.state.services = replace(services, config=replace(services.config, unknown_fields="reject"))
    try:
        reply, _ = await observed(model, table.path, {**table.example, "nonsense": 1})
    finally:
        model.app.state.services = services
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "nonsense")


@pytest.mark.parametrize("table", VECTOR_TABLES, ids=lambda table: table.path)
async def test_a_time_limit(table: VectorTable, models: dict[Model, Bench]) -> None:
    model = models[table.model]
    model.engine.limit, model.engine.num_updates = 0, 0
    model.engine.resume = asyncio.Event()
    try:
        reply, _ = await observed(model, table.path, {**table.example, "timeout": 0.05})
    finally:
        model.engine.limit = float("inf")
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert model.engine.aborted, "the engine must not go on"


@pytest.mark.parametrize("table", VECTOR_TABLES, ids=lambda table: table.path)
async def test_a_client_that_goes_away(table: VectorTable, models: dict[Model, Bench]) -> None:
    model = models[table.model]
    engine = model.engine
    engine.limit, engine.num_updates, engine.aborted = 0, 0, []
    engine.stalled, engine.resume, engine.left = asyncio.Event(), asyncio.Event(), asyncio.Event()
    engine.requests.clear()
    try:
        async with Exchange(model.app, table.path, dict(table.example)) as exchange:
            await asyncio.wait_for(engine.stalled.wait(), TIMEOUT_SECONDS)
            exchange.disconnect()
            await asyncio.wait_for(engine.left.wait(), TIMEOUT_SECONDS)
    finally:
        engine.limit = float("inf")
    assert sorted(engine.aborted) == sorted(request.id for request in engine.requests)
    waiting = model.app.state.services.edge.waiting
    assert (waiting.total, waiting.num_choices) == (0, 0)


@pytest.mark.parametrize("table", VECTOR_TABLES, ids=lambda table: table.path)
async def test_another_model_is_not_found(table: VectorTable, models: dict[Model, Bench]) -> None:
    reply, _ = await observed(models[table.model], table.path, {**table.example, "model": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_replies_have_the_types_of_the_official_client(models: dict[Model, Bench]) -> None:
    reply, _ = await observed(models["text"], "/v1/embeddings", HI)
    check(CreateEmbeddingResponse, reply.text)
