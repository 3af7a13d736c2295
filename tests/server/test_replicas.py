"""The demonstration model on two engines behind one server: the same replies as of one engine, also after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.replicas.engines import Engines
from jamba_server.server.cli.server import open_engine
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.real_engine import served_engine
from tests.server.test_metrics import samples

CONFIG = ServerConfig(
    served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4, data_parallel_size=2
)
STORY = "Tell me a story about a dog, a ball, a long day at the sea and what happened on the way back home."
BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40, "logprobs": True},
    {"temperature": 1, "max_tokens": 40, "n": 2},
    {"temperature": 0.8, "max_tokens": 40, "seed": 3},
    {"temperature": 0, "max_tokens": 40, "frequency_penalty": 0.5},
]


Reply = dict[int, tuple[str, list[float], str | None]]


async def stream(client: AsyncOpenAI, number: int, opened: asyncio.Event, engine: Engines | None) -> Reply:
    """The text, the log-probabilities and the end of each choice. Kills the first engine, if it is given, in the middle
    of the first request."""
    found: Reply = {}
    messages: Any = [{"role": "user", "content": f"{number}. {STORY}"}]
    body: Any = {"stream": True, "extra_body": {"ignore_eos": True}, **BODIES[number]}
    async for chunk in await client.chat.completions.create(model="jamba-demo", messages=messages, **body):
        opened.set()
        for choice in chunk.choices:
            text, scores, _ = found.get(choice.index, ("", [], None))
            scores = [*scores, *(entry.logprob for entry in (choice.logprobs and choice.logprobs.content) or [])]
            found[choice.index] = (text + (choice.delta.content or ""), scores, choice.finish_reason)
            if engine is not None and number == 0 and len(scores) >= 10:
                pid, engine = engine.members[0].pid, None
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
    return found


async def replies(client: AsyncOpenAI, engine: Engines | None = None) -> list[Reply]:
    tasks: list[asyncio.Task[Reply]] = []
    for number in range(len(BODIES)):  # one after the other, so that each draws its own seed in every run
        opened = asyncio.Event()
        tasks.append(asyncio.create_task(stream(client, number, opened, engine)))
        await opened.wait()
    return [await task for task in tasks]


async def conversation(client: AsyncOpenAI, turns: int) -> list[int]:
    """The numbers of cached prompt tokens of the turns."""
    messages, cached = list[Any](), list[int]()
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn}: {STORY}"})
        reply = await client.chat.completions.create(
            model="jamba-demo", messages=messages, temperature=0, max_tokens=4, extra_body={"ignore_eos": True}
        )
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        cached.append(reply.usage.prompt_tokens_details.cached_tokens or 0)
    return cached


async def test_two_engines_answer_as_one() -> None:
    one = EngineClient(CONFIG.engine(demo_folder()))
    await one.start()
    async with served_engine(CONFIG, one) as client:
        expected = await replies(client)
        alone = await conversation(client, 3)
    await one.close()
    both = open_engine(CONFIG, demo_folder(), lambda phase, fraction: None)
    assert isinstance(both, Engines)
    await both.start()
    try:
        async with served_engine(CONFIG, both) as client:
            assert await replies(client) == expected
            assert [sum(reasons.values()) > 0 for reasons in both.routed] == [True, True]
            assert await conversation(client, 3) == alone, "each turn finds the state of the turn before"
            assert alone[2] > alone[1] > 0
        async with served_engine(CONFIG, both) as client:  # draws the same seeds again
            assert await replies(client, both) == expected
            assert both.supervision.restarts["signal"] == 1
            assert both.supervision.replayed_requests > 0
            base = str(client.base_url).removesuffix("/v1/")
            async with httpx.AsyncClient(base_url=base) as http:
                assert (await http.get("/ready")).status_code == 200
                assert (await http.get("/server_info")).json()["data_parallel_size"] == 2
                found = samples((await http.get("/metrics")).text)
        assert found["jamba_replica_restarts_total", "0"] == 1
        assert found["jamba_replica_restarts_total", "1"] == 0
        assert found["jamba_replica_ready", "1"] == 1
        queries = [found["jamba_replica_prefix_cache_queries_total", engine] for engine in "01"]
        assert found["jamba_prefix_cache_queries_total",] == sum(queries)
        assert min(queries) > 0
    finally:
        await both.close()


def test_what_does_not_work_with_several_engines_is_refused() -> None:
    config = ServerConfig(data_parallel_size=2, state_cache_host_bytes=1)
    with pytest.raises(ConfigError, match="state_cache_host_bytes 1 does not work with data_parallel_size 2"):
        open_engine(config, demo_folder(), lambda phase, fraction: None)
