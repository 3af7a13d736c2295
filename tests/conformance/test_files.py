"""Each field of an upload and of a batch has the effect that its row says, through OpenAI's client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch, FileDeleted, FileObject

from tests.conformance.apis import ChatApi, ResponseApi
from tests.conformance.file_rows import (
    BATCH,
    BATCHES,
    FILE,
    OUTPUT_EXPIRES,
    REFUSED_BATCHES,
    REFUSED_UPLOADS,
    UPLOAD,
)
from tests.conformance.rows import Refused, Row, met
from tests.conformance.served import Served, serve
from tests.conformance.strict import check
from tests.server.batch_client import content, line, start, until


@pytest.fixture
def client(served: dict[str, Served]) -> AsyncOpenAI:
    api = served["jamba"].api(ChatApi)
    assert isinstance(api, ChatApi)
    return api.client


async def uploaded(client: AsyncOpenAI, form: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in form.items() if name not in FILE and name not in UPLOAD_FIELDS}
    expires = {
        name: form[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in form
    }
    more: Any = {"expires_after": expires} if expires else {}
    raw = await client.files.with_raw_response.create(
        file=form["file"], purpose=form["purpose"], extra_body=fields, **more
    )
    check(FileObject, raw.text)
    return json.loads(raw.text)


UPLOAD_FIELDS = {row.field for row in UPLOAD}


@pytest.mark.parametrize("row", UPLOAD, ids=str)
async def test_a_field_of_an_upload(row: Row, client: AsyncOpenAI) -> None:
    other = await uploaded(client, dict(row.base))
    found = await uploaded(client, {**row.base, **row.body})
    for path, expected in row.reply.items():
        assert met(path, expected, found, other)
        assert not met(path, expected, other, other)
    for reply in (found, other):
        check(FileDeleted, (await client.files.with_raw_response.delete(reply["id"])).text)


@pytest.mark.parametrize("row", REFUSED_UPLOADS, ids=str)
async def test_a_refused_field_of_an_upload(row: Refused, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await uploaded(client, {**FILE, **row.body})
    assert error.value.param == row.field


async def made(client: AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in body.items() if name in (*BATCH, "input_file_id", "metadata")}
    others = {name: value for name, value in body.items() if name not in known}
    raw = await client.batches.with_raw_response.create(**known, extra_body=others)
    check(Batch, raw.text)
    return json.loads(raw.text)


@pytest.mark.parametrize("row", BATCHES, ids=str)
async def test_a_field_of_a_batch(row: Row, client: AsyncOpenAI) -> None:
    file = (await uploaded(client, FILE))["id"]
    body = dict(row.body)
    if row.field == "input_file_id":
        body["input_file_id"] = (await uploaded(client, FILE))["id"]
    other = await made(client, {**BATCH, "input_file_id": file})
    found = await made(client, {**BATCH, "input_file_id": file, **body})
    for path, expected in row.reply.items():
        assert met(path, expected, found, other)
        assert not met(path, expected, other, other)


@pytest.mark.parametrize("row", REFUSED_BATCHES, ids=str)
async def test_a_refused_field_of_a_batch(row: Refused, client: AsyncOpenAI) -> None:
    file = (await uploaded(client, FILE))["id"]
    with pytest.raises(openai.BadRequestError) as error:
        await made(client, {**BATCH, "input_file_id": file, **row.body})
    assert error.value.param == (row.param or row.field)


async def test_the_time_of_the_results_files(tmp_path: Path) -> None:
    model = serve(tmp_path, "jamba-1.5")  # an application of its own, because this test ends it
    model.say(" hello")
    async with model.app.router.lifespan_context(model.app):
        api = model.api(ResponseApi)
        assert isinstance(api, ResponseApi)
        done = [
            await until(api.client, await start(api.client, [line("a"), "nonsense"], extra_body=body), "completed")
            for body in (OUTPUT_EXPIRES, {})
        ]
        for batch, lifetime in zip(done, (7200, 30 * 24 * 3600), strict=True):
            assert len(await content(api.client, batch.output_file_id)) == 1
            for id_ in (batch.output_file_id, batch.error_file_id):
                assert id_ is not None
                file = await api.client.files.retrieve(id_)
                assert file.expires_at == file.created_at + lifetime
                assert file.purpose == "batch_output"
