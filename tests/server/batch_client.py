"""Makes batches through OpenAI's client, and waits for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch

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


async def start(
    client: AsyncOpenAI, lines: Iterable[Json | str], endpoint: Any = CHAT, window: Any = "24h", **fields: Any
) -> Batch:
    return await client.batches.create(
        input_file_id=await upload(client, lines), endpoint=endpoint, completion_window=window, **fields
    )


async def until(client: AsyncOpenAI, batch: Batch, *statuses: str, finished: int = 0) -> Batch:
    """Polls until the batch has one of the statuses and so many finished lines; only a test that fails waits long."""
    for _ in range(1000):
        batch = await client.batches.retrieve(batch.id)
        if batch.status in statuses and sum(counts(batch)[1:]) >= finished:
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


def ids(lines: Iterable[Json]) -> list[str]:
    return sorted(each["custom_id"] for each in lines)
