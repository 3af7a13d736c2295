"""Batches from the upload of their input to their results, through OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from tests.server.conftest import HELLO, MakeBench

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
    RESPONSES: {"input": "Hi"},
}
Json = dict[str, Any]


def line(custom_id: object, url: str = CHAT, **fields: Any) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": BODIES[url], **fields}


def jsonl(lines: Iterable[Json | str]) -> bytes:
    return "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines).encode()


async def upload(client: AsyncOpenAI, lines: Iterable[Json | str]) -> str:
    return (await client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")).id


async def start(client: AsyncOpenAI, lines: Iterable[Json | str], endpoint: Any = CHAT, window: Any = "24h") -> Batch:
    return await client.batches.create(
        input_file_id=await upload(client, lines), endpoint=endpoint, completion_window=window
    )


async def until(client: AsyncOpenAI, batch: Batch, *statuses: str) -> Batch:
    """Polls; only a test that fails waits long."""
    for _ in range(100):
        batch = await client.batches.retrieve(batch.id)
        if batch.status in statuses:
            return batch
        await asyncio.sleep(0.005)
    raise AssertionError(batch)


async def content(client: AsyncOpenAI, file_id: str | None) -> list[Json]:
    if file_id is None:
        return []
    return [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


@pytest.fixture
async def client(make_bench: MakeBench, tmp_path: Path) -> AsyncGenerator[AsyncOpenAI]:
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        yield client


@pytest.mark.parametrize("url", BODIES)
async def test_a_batch_gives_the_reply_of_the_endpoint_for_each_line(client: AsyncOpenAI, url: str) -> None:
    batch = await start(client, [line(f"c{i}", url) for i in range(20)], url)
    assert batch.status == "validating"
    done = await until(client, batch, "completed")
    assert counts(done) == (20, 20, 0)
    assert done.error_file_id is None
    output = await content(client, done.output_file_id)
    assert sorted(each["custom_id"] for each in output) == sorted(f"c{i}" for i in range(20))
    for each in output:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert HELLO.strip() in json.dumps(each["response"]["body"])
    usage = [each["response"]["body"]["usage"] for each in output]
    assert done.usage is not None
    assert done.usage.total_tokens == sum(each["total_tokens"] for each in usage)
