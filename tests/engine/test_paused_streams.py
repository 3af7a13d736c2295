"""The real engine: a request that is paused again and again gives the same bits as one that is read at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder

PROMPT = [1, *range(300, 360)]
PARAMS = {
    "greedy": SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True, logprobs=2),
    "sampled": SamplingParams(max_tokens=120, seed=3, ignore_eos=True, frequency_penalty=0.4, min_tokens=20),
    "scored": SamplingParams(max_tokens=60, seed=4, ignore_eos=True, logprobs=1, prompt_logprobs=1),
}


@pytest.fixture
async def engine() -> AsyncIterator[EngineClient]:
    config = ServerConfig(threads=1, max_num_seqs=8)
    client = EngineClient(config.engine(demo_folder()))
    await client.start()
    yield client
    await client.close()


async def read(engine: EngineClient, suffix: str, *, waits: bool) -> dict[str, list[object]]:
    """Tokens and log-probabilities by name. `waits` lets the engine run until it has nothing more to do, or pauses,
    before each update is taken."""
    requests = [Request(id=f"{name} {suffix}", prompt=PROMPT, params=params) for name, params in PARAMS.items()]
    updates: list[TokenUpdate] = []
    async with engine.generate(requests) as stream:
        async for update in stream:
            updates.append(update)
            while waits and engine.is_busy:
                await asyncio.sleep(0.002)
    found: dict[str, list[object]] = {}
    for request in requests:
        own = [u for u in updates if u.request_id == request.id]
        assert [u.finish_reason for u in own if u.finish_reason] == ["length"]
        assert sum(u.num_cached is not None for u in own) == 1
        found[request.id.split()[0]] = [
            [t for u in own for t in u.token_ids],
            [s for u in own for s in u.logprobs],
            [s for u in own for s in u.prompt_logprobs],
        ]
    return found


async def test_pauses_change_no_bit(engine: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await read(engine, "undisturbed", waits=False)
    assert engine.supervision.pauses == 0
    assert len(expected["scored"][2]) == len(PROMPT)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("jamba_server.engine.process.streams.BACKLOG_BYTES", 20_000)
    monkeypatch.setattr("jamba_server.engine.process.streams.BACKLOG_BYTES_PER_REQUEST", 0)
    assert await read(engine, "paused", waits=True) == expected
    assert engine.supervision.pauses > 3
