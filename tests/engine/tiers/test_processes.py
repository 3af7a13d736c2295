"""The disk tier with real engine processes: what is computed before SIGTERM or SIGKILL is found afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.types import Request, SamplingParams, TokenLogprob
from tests.engine.tiers.conversations import Cold, make_model

PROMPT = [3 + i % 250 for i in range(200)]
PARAMS = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2)


def client(tmp_path: Path) -> EngineClient:
    model = str(make_model(tmp_path / "model"))
    return EngineClient(
        EngineConfig(
            model=model, load_format="dummy", max_model_len=512, threads=1, state_cache_disk_path=str(tmp_path / "disk")
        )
    )


async def reply(engine: EngineClient, prompt: list[int]) -> tuple[list[int], list[TokenLogprob], int]:
    """Tokens, log-probabilities, and how many tokens were cached."""
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    cached = 0
    async with engine.generate([Request(id=os.urandom(8).hex(), prompt=prompt, params=PARAMS)]) as updates:
        async for update in updates:
            tokens += update.token_ids
            logprobs += update.logprobs
            cached = cached if update.num_cached is None else update.num_cached
    return tokens, logprobs, cached


async def until_open(engine: EngineClient) -> None:
    """Runs short requests until the engine has found what is on the disk."""
    for i in range(1000):
        await reply(engine, [5, i % 200 + 3])
        if engine.stats.tiers is not None and engine.stats.tiers.segments["disk"]:
            return
    raise AssertionError("the disk tier was not opened")


async def test_a_conversation_outlasts_restarts(tmp_path: Path) -> None:
    cold = Cold(make_model(tmp_path / "model"))
    first = cold(Request(id="first", prompt=PROMPT, params=PARAMS))
    second = cold(Request(id="second", prompt=[*PROMPT, *first[0], 7, 8, 9], params=PARAMS))

    engine = client(tmp_path)
    await engine.start()
    assert (await reply(engine, PROMPT))[:2] == first
    await engine.close()  # as SIGTERM does

    engine = client(tmp_path)
    await engine.start()
    await until_open(engine)
    tokens, logprobs, cached = await reply(engine, [*PROMPT, *first[0], 7, 8, 9])
    assert (tokens, logprobs) == second
    assert cached == len(PROMPT) + len(first[0]) - 1
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until_open(engine)
    tokens, logprobs, cached = await reply(engine, [*PROMPT, *first[0], 7, 8, 9])
    assert (tokens, logprobs) == second
    assert cached >= len(PROMPT) + len(first[0]) - 1
    stats = engine.stats.tiers
    assert stats is not None
    assert stats.hits_total["disk"] == 2, "hits of both engine processes are counted"
    await engine.close()
