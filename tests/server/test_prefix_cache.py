"""What the prefix cache saves, as a client sees it: usage in the reply, counters in /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.real_engine import served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Talk:
    """A client of the server of this module. What it caches is found by no other test, because its salt is its own."""

    client: AsyncOpenAI
    engine: EngineClient
    salt: str

    async def chat(self, messages: list[Any], **fields: Any) -> tuple[str, int, int]:
        """(reply, prompt tokens, those of them that came from the cache)."""
        reply = await self.client.chat.completions.create(
            model="jamba-demo",
            messages=messages,
            max_tokens=8,
            temperature=0,
            extra_body={"cache_salt": self.salt},
            **fields,
        )
        usage = reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return (
            reply.choices[0].message.content or "",
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0,
        )

    async def metric(self, name: str) -> float:
        root = str(self.client.base_url).removesuffix("v1/")
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{root}metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncGenerator[tuple[AsyncOpenAI, EngineClient]]:
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine) as client:
        yield client, engine
    await engine.close()


@pytest.fixture
def talk(server: tuple[AsyncOpenAI, EngineClient], request: pytest.FixtureRequest) -> Talk:
    return Talk(*server, request.node.name)


def system(num_words: int) -> dict[str, str]:
    return {"role": "system", "content": " ".join(["once upon a time there was a dog"] * num_words)}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def test_a_shared_system_message_pays_from_the_second_chat(talk: Talk) -> None:
    message = system(40)
    names = ("jamba_prefix_cache_hits_total", "jamba_prefix_cache_queries_total", "jamba_saved_states")
    hits, queries, states = [await talk.metric(name) for name in names]
    _, first, cached = await talk.chat([message, user("What did the dog do in the garden then?")])
    assert first > 300
    assert cached == 0
    _, _, cached = await talk.chat([message, user("Who had a red ball?")])
    assert cached >= 288
    assert await talk.metric("jamba_prefix_cache_hits_total") - hits == cached
    assert await talk.metric("jamba_prefix_cache_queries_total") - queries > 600
    assert await talk.metric("jamba_saved_states") > states


@pytest.mark.parametrize("words", range(1, 34, 4))
async def test_the_second_turn_reuses_the_first_ones_prompt(talk: Talk, words: int) -> None:
    turns = [user(" ".join(["ball"] * words))]
    answer, prompt, _ = await talk.chat(turns)
    turns += [{"role": "assistant", "content": answer}, user("And then?")]
    _, _, cached = await talk.chat(turns)
    assert cached >= prompt // 16 * 16


async def test_choices_share_their_prompt(talk: Talk) -> None:
    before = await talk.metric("jamba_prefix_cache_hits_total")
    _, prompt, cached = await talk.chat([system(10), user("Go on.")], n=3)
    assert cached == 0, "the first choice computed it"
    assert await talk.metric("jamba_prefix_cache_hits_total") - before == 2 * ((prompt - 1) // 16 * 16)


async def test_a_vanished_client_frees_its_slot(talk: Talk) -> None:
    root, before = str(talk.client.base_url), await talk.metric("jamba_generation_tokens_total")
    body = {"prompt": [5] * 50, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient() as http, http.stream("POST", f"{root}completions", json=body) as reply:
        async for _ in reply.aiter_lines():
            break
        assert talk.engine.stats.num_running == 1
    while talk.engine.stats.num_running or talk.engine.stats.state_slots_used:
        await asyncio.sleep(0.005)
    assert await talk.metric("jamba_generation_tokens_total") - before < 4000, "it was not written to its end"
    assert await talk.metric("jamba_state_slots_used") == 0
