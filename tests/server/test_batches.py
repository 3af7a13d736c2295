"""Batches from the upload of their input to their results, through OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from jamba_server.engine.errors import EngineFailed, Overloaded
from jamba_server.engine.types import Request
from jamba_server.server.http.batches import runner
from tests.conformance.strict import check
from tests.server.batch_client import BODIES, CHAT, RESPONSES, content, counts, ids, line, start, until, upload
from tests.server.conftest import HELLO, Ids, MakeBench
from tests.server.fake_engine import Event, FakeEngine, says

IN_FLIGHT = 3


@pytest.fixture
async def client(make_bench: MakeBench, tmp_path: Path) -> AsyncGenerator[AsyncOpenAI]:
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        yield client


@pytest.mark.parametrize("url", BODIES)
async def test_a_batch_gives_the_reply_of_the_endpoint_for_each_line(client: AsyncOpenAI, url: str) -> None:
    batch = await start(client, [line(f"c{i}", url) for i in range(20)], url, metadata={"job": "7"})
    assert batch.status == "validating"
    done = await until(client, batch, "completed")
    assert counts(done) == (20, 20, 0)
    assert done.error_file_id is None
    assert done.metadata == {"job": "7"}
    assert done.in_progress_at
    assert done.finalizing_at
    assert done.completed_at
    output = await content(client, done.output_file_id)
    assert ids(output) == sorted(f"c{i}" for i in range(20))
    assert len({each["id"] for each in output}) == 20
    for each in output:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert HELLO.strip() in json.dumps(each["response"]["body"])
    usage = [each["response"]["body"]["usage"] for each in output]
    assert done.usage is not None
    assert done.usage.total_tokens == sum(each["total_tokens"] for each in usage)
    raw = await client.batches.with_raw_response.retrieve(batch.id)
    check(Batch, raw.text)


async def test_a_batch_of_embeddings(make_bench: MakeBench, tmp_path: Path, engine: FakeEngine) -> None:
    url = "/v1/embeddings"
    lines = [{"custom_id": f"c{i}", "method": "POST", "url": url, "body": {"input": ["Hi", "Ho"]}} for i in range(9)]
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        done = await until(client, await start(client, lines, url), "completed")
        assert counts(done) == (9, 9, 0)
        for each in await content(client, done.output_file_id):
            assert len(each["response"]["body"]["data"]) == 2
        assert done.usage is not None
        assert done.usage.input_tokens > 0
    assert all(request.is_background for request in engine.requests)


async def test_an_invalid_line_fails_alone_and_with_a_reason(client: AsyncOpenAI) -> None:
    lines = [
        line("good"),
        '{"custom_id": ',
        line("good"),
        line("url", RESPONSES),
        line("stream", body=BODIES[CHAT] | {"stream": True}),
        line("temperature", body=BODIES[CHAT] | {"temperature": 9}),
        line("get", method="GET"),
        line("extra", priority=1),
        "[]",
        "",
        line(""),
        line("body", body="Hi"),
    ]
    done = await until(client, await start(client, lines), "completed")
    assert counts(done) == (11, 1, 10)
    assert ids(await content(client, done.output_file_id)) == ["good"]
    errors = await content(client, done.error_file_id)
    told = {(each["custom_id"], (each["error"] or each["response"]["body"]["error"])["code"]) for each in errors}
    assert told == {
        (None, "invalid_json_line"),
        ("good", "duplicate_custom_id"),
        ("url", "invalid_url"),
        ("stream", "unsupported_parameter"),
        ("temperature", None),
        ("get", "invalid_method"),
        ("extra", "unknown_parameter"),
        (None, "invalid_custom_id"),
        ("body", "invalid_body"),
    }
    [wrong] = [each["response"] for each in errors if each["custom_id"] == "temperature"]
    assert wrong["status_code"] == 400
    assert wrong["body"]["error"]["param"] == "temperature"
    assert any("Line 4: " in each["error"]["message"] for each in errors if each["custom_id"] == "url")


@pytest.mark.parametrize(("lines", "code"), [([" "], "empty_file"), ([line(i) for i in range(4)], "too_many_requests")])
async def test_a_file_that_is_no_batch_fails_as_a_whole(
    client: AsyncOpenAI, lines: list[Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = runner.read_contents
    monkeypatch.setattr(runner, "read_contents", lambda *values, **named: read(*values, **named, max_lines=3))
    failed = await until(client, await start(client, lines), "failed")
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [error.code for error in failed.errors.data] == [code]
    assert failed.failed_at
    assert failed.output_file_id is None


async def test_lines_run_in_the_background_a_few_at_a_time_and_live_requests_as_before(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    bench = make_bench(data_dir=str(tmp_path), max_batch_requests=IN_FLIGHT, max_queue_requests=1, enable_priority=True)
    engine.limit = 0
    async with bench.openai() as client:
        lines = [line(f"c{i}", body=BODIES[CHAT] | {"priority": -5 + i}) for i in range(9)]
        batch = await start(client, lines)
        await engine.stalled.wait()
        await until(client, batch, "in_progress")
        assert len(engine.requests) <= IN_FLIGHT
        assert bench.app.state.services.edge.waiting.num_choices == 0, "they do not count as waiting"
        live = asyncio.create_task(client.chat.completions.create(model="jamba", **BODIES[CHAT]))
        while not any(not request.is_background for request in engine.requests):
            await asyncio.sleep(0)
        engine.limit = float("inf")
        engine.resume.set()
        await live
        await until(client, batch, "completed")
    background = [request for request in engine.requests if request.is_background]
    assert len(background) == 9
    priorities = sorted(request.priority for request in background)
    assert priorities == list(range(priorities[0], priorities[0] + 9)), "their own priorities count among them"
    text = (await _metrics(bench)).splitlines()
    [count] = [line for line in text if line.startswith("jamba_time_to_first_token_seconds_count")]
    assert count.endswith(" 1.0"), "only the live request is in the latencies"


async def _metrics(bench: Any) -> str:
    async with bench.http() as http:
        return (await http.get("/metrics")).text


async def test_a_batch_goes_on_after_a_kill_without_a_line_lost_or_repeated(
    make_bench: MakeBench, tmp_path: Path, ids: Ids
) -> None:
    """A copy of the data is what a kill leaves."""
    old, new = FakeEngine(says(ids(HELLO)), limit=41), FakeEngine(says(ids(HELLO)))
    killed, copy = tmp_path / "killed", tmp_path / "copy"
    lines = [*(line(f"c{i}") for i in range(20)), "nonsense"]
    async with make_bench(data_dir=str(killed), max_batch_requests=IN_FLIGHT, engine=old).openai() as client:
        batch = await start(client, lines)
        await old.stalled.wait()
        before = await until(client, batch, "in_progress", finished=3)
        shutil.copytree(killed, copy)
    table = runner.BatchTable(copy / "batches.sqlite")
    kept = table.get(batch.id, "")
    table.close()
    assert kept is not None
    finished = kept.completed + kept.failed
    assert sum(counts(before)[1:]) <= finished < 21, "a line may have finished since the client asked"
    async with make_bench(data_dir=str(copy), engine=new).openai() as client:
        done = await until(client, batch, "completed")
        assert counts(done) == (21, 20, 1)
        output = await content(client, done.output_file_id)
        assert sorted(each["custom_id"] for each in output) == sorted(f"c{i}" for i in range(20))
    assert len(new.requests) == 21 - finished, "finished lines are not run again"


async def test_a_kill_between_the_files_and_the_end_makes_no_second_file(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runner.BatchTable, "end", fail)
        async with make_bench(data_dir=str(tmp_path)).openai() as client:
            batch = await start(client, [line("a"), "nonsense"])
            await until(client, batch, "finalizing", finished=2)
            assert (await client.batches.retrieve(batch.id)).output_file_id is None
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        done = await until(client, batch, "completed")
        names = [file.filename async for file in client.files.list(purpose="batch_output")]
        assert sorted(names) == [f"{batch.id}_error.jsonl", f"{batch.id}_output.jsonl"]
        assert len(await content(client, done.output_file_id)) == 1


async def test_a_batch_whose_input_is_gone_fails_and_others_go_on(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    engine.limit = 0
    async with make_bench(data_dir=str(tmp_path), max_batch_requests=1).openai() as client:
        lost, other = [await start(client, [line("a"), line("b")]) for _ in range(2)]
        await until(client, other, "in_progress")
    (tmp_path / "files" / lost.input_file_id).unlink()
    engine.limit = float("inf")
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        failed = await until(client, lost, "failed")
        assert failed.errors is not None
        assert failed.errors.data is not None
        assert [error.code for error in failed.errors.data] == ["input_file_missing"]
        assert counts(await until(client, other, "completed")) == (2, 2, 0)


async def test_a_cancelled_batch_keeps_what_has_finished(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    engine.limit = 30
    async with make_bench(data_dir=str(tmp_path), max_batch_requests=IN_FLIGHT).openai() as client:
        batch = await start(client, [line(f"c{i}") for i in range(20)])
        await engine.stalled.wait()
        before = await until(client, batch, "in_progress", finished=1)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status in ("cancelling", "cancelled")
        done = await until(client, batch, "cancelled")
        assert done.cancelling_at
        assert done.cancelled_at
        assert counts(before)[1] <= counts(done)[1] < 20
        assert len(await content(client, done.output_file_id)) == counts(done)[1]
        assert engine.aborted, "lines in flight are aborted"
        assert (await client.batches.cancel(batch.id)).status == "cancelled", "again is no error"
        engine.resume.set()
        other = await until(client, await start(client, [line("a")]), "completed")
        with pytest.raises(openai.BadRequestError) as error:
            await client.batches.cancel(other.id)
        assert error.value.param == "batch_id"


async def test_a_line_that_is_cancelled_before_it_begins_leaves_its_place_to_others(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, cancelled = asyncio.create_task, list[asyncio.Task[Any]]()

    def create_task(work: Any, *, name: str) -> asyncio.Task[Any]:
        task = create(work, name=name)
        if name.startswith("batch_") and len(cancelled) < runner.MAX_PREPARING:
            cancelled.append(task)
            task.cancel()
        return task

    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        monkeypatch.setattr(runner.asyncio, "create_task", create_task)
        await start(client, [line(f"c{i}") for i in range(runner.MAX_PREPARING)])
        other = await start(client, [line("a")])
        assert counts(await until(client, other, "completed")) == (1, 1, 0)
        assert len(cancelled) == runner.MAX_PREPARING


async def test_an_expired_batch_has_an_error_for_each_line_that_is_left(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    engine.limit = 30
    bench = make_bench(data_dir=str(tmp_path), max_batch_requests=IN_FLIGHT)
    store = bench.app.state.services.batches
    async with bench.openai() as client:
        batch = await start(client, [line(f"c{i}") for i in range(20)], window="1h")
        assert batch.expires_at == batch.created_at + 3600
        await engine.stalled.wait()
        before = await until(client, batch, "in_progress", finished=1)
        clock = store.now
        store.now = lambda: clock() + 3600
        store.changed.set()
        done = await until(client, batch, "expired")
        assert done.expired_at
        assert counts(before)[1] <= counts(done)[1] < 20
        assert sum(counts(done)[1:]) == 20
        errors = await content(client, done.error_file_id)
        assert {each["error"]["code"] for each in errors} == {"batch_expired"}
        output = await content(client, done.output_file_id)
        assert sorted(each["custom_id"] for each in [*errors, *output]) == sorted(f"c{i}" for i in range(20))


async def test_a_line_waits_while_the_server_cannot_run_it(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.01)
    engine.refusal = Overloaded("full")
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        batch = await start(client, [line("a")])
        await until(client, batch, "in_progress")
        engine.refusal = None
        assert counts(await until(client, batch, "completed")) == (1, 1, 0)


async def test_what_goes_wrong_with_a_line_is_its_result(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    errors: Iterator[Exception] = iter([EngineFailed("it died"), RuntimeError("a bug")])

    def script(_: Request) -> Iterator[Event]:
        yield next(errors)

    engine.script = script
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        done = await until(client, await start(client, [line("a"), line("b")]), "completed")
        assert counts(done) == (2, 0, 2)
        replies = [each["response"] for each in await content(client, done.error_file_id)]
        assert {(reply["status_code"], reply["body"]["error"]["code"]) for reply in replies} == {
            (500, "engine_failed"),
            (500, "internal_error"),
        }


async def test_a_full_disk_stops_a_batch_for_a_while_and_is_logged_once(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, attempts = runner.BatchTable.put, list[int]()

    def full(table: runner.BatchTable, number: int, results: Any) -> None:
        attempts.append(number)
        if len(attempts) <= 20:
            raise sqlite3.OperationalError("database or disk is full")
        put(table, number, results)

    monkeypatch.setattr(runner.BatchTable, "put", full)
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.001)
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        batch = await start(client, [line(f"c{i}") for i in range(10)])
        assert counts(await until(client, batch, "completed")) == (10, 10, 0)
    assert caplog.text.count("disk is full") == 1


async def test_responses_of_a_batch_are_stored_only_on_demand(client: AsyncOpenAI) -> None:
    lines = [line("a", RESPONSES), line("b", RESPONSES, body={"input": "Hi", "store": True})]
    done = await until(client, await start(client, lines, RESPONSES), "completed")
    output = {each["custom_id"]: each["response"]["body"] for each in await content(client, done.output_file_id)}
    assert (await client.responses.retrieve(output["b"]["id"])).id == output["b"]["id"]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(output["a"]["id"])


async def test_the_list_has_pages_and_is_the_owners_own(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench(data_dir=str(tmp_path), api_key=("one", "two"))
    async with bench.openai("one") as client:
        made = [await start(client, [line("a")]) for _ in range(5)]
        newest = [batch.id for batch in reversed(made)]
        assert [batch.id async for batch in client.batches.list(limit=2)] == newest
        page = await client.batches.list(limit=2, after=newest[1])
        assert [batch.id for batch in page.data] == newest[2:4]
        assert page.has_more
        with pytest.raises(openai.BadRequestError):
            await client.batches.list(after="batch_none")
        done = await until(client, made[0], "completed")
        other = client.with_options(api_key="two")
        assert [batch async for batch in other.batches.list()] == []
        for call in (other.batches.retrieve(done.id), other.batches.cancel(done.id)):
            with pytest.raises(openai.NotFoundError):
                await call
        assert done.output_file_id is not None
        for id_ in (done.input_file_id, done.output_file_id):
            with pytest.raises(openai.NotFoundError):
                await other.files.retrieve(id_)
        with pytest.raises(openai.BadRequestError) as error:
            await other.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h")
        assert error.value.param == "input_file_id"


async def test_lines_count_against_no_limit_of_the_key(make_bench: MakeBench, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text('{"key": "one", "name": "ann", "requests_per_minute": 5, "tokens_per_minute": 3}\n')
    async with make_bench(data_dir=str(tmp_path / "data"), api_key_file=str(keys)).openai("one") as client:
        batch = await start(client, [line(f"c{i}") for i in range(20)])
        assert counts(await until(client, batch, "completed")) == (20, 20, 0)


async def test_an_owner_has_a_limited_number_of_open_batches(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jamba_server.server.http.batches.store.MAX_OPEN", 2)
    engine.limit = 0
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        file = await upload(client, [line("a")])
        for _ in range(2):
            await client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
        with pytest.raises(openai.RateLimitError):
            await client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")


async def test_the_input_of_a_running_batch_cannot_be_deleted(
    make_bench: MakeBench, tmp_path: Path, engine: FakeEngine
) -> None:
    engine.limit = 0
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        batch = await start(client, [line("a")])
        with pytest.raises(openai.BadRequestError, match=batch.id):
            await client.files.delete(batch.input_file_id)
        await client.batches.cancel(batch.id)
        await until(client, batch, "cancelled")
        assert (await client.files.delete(batch.input_file_id)).deleted
