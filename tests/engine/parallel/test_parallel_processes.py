"""An engine of several processes: it answers as one process does, also after one of them was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.start.rank_options import check_ranks
from jamba_server.engine.types import Request, SamplingParams
from tests.engine.parallel.engines import Reply, replies, running
from tests.tiny import save_tiny

PARAMS = SamplingParams(max_tokens=60, temperature=0.8, seed=4, ignore_eos=True, logprobs=2)
REQUESTS = [Request(id=str(i), prompt=[(7 * i + 3 * j) % 60 + 3 for j in range(20)], params=PARAMS) for i in range(3)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder)
    return EngineConfig(model=str(folder), dtype="float32", threads=1, max_num_seqs=4, max_model_len=128)


async def answers(engine: EngineClient, victim: int | None = None) -> dict[str, Any]:
    """What the engine answers. If `victim` is given, the process of this rank is killed when half of it is there."""
    found, count = {request.id: Reply() for request in REQUESTS}, 0
    async with engine.generate(list(REQUESTS)) as stream:
        async for update in stream:
            found[update.request_id].take(update)
            count += 1
            if count == len(REQUESTS) * PARAMS.max_tokens // 2 and victim is not None:
                os.kill(processes(engine)[victim], signal.SIGKILL)
    return {name: reply.content for name, reply in found.items()}


def processes(engine: EngineClient) -> list[int]:
    """The process ids of the ranks."""
    pid = engine.pid
    assert pid is not None
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def is_running(pid: int) -> bool:
    """Whether there is such a process. A process that has ended is there until its parent has noticed that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def all_end(pids: list[int]) -> None:
    async with asyncio.timeout(300):
        while any(map(is_running, pids)):
            await asyncio.sleep(0.01)


async def test_any_process_is_killed_under_load(config: EngineConfig) -> None:
    with running(msgspec.structs.replace(config, tensor_parallel_exact=True)) as core:
        expected = {name: reply.content for name, reply in replies(core, REQUESTS).items()}
    engine = EngineClient(msgspec.structs.replace(config, tensor_parallel_size=2))
    info = await engine.start()
    assert (info.tensor_parallel_size, info.tensor_parallel_exact) == (2, True)
    for victim in (1, 0):
        before = processes(engine)
        assert len(before) == 2
        assert await answers(engine, victim) == expected
        assert not {*before} & {*processes(engine)}, "all ranks are started again"
        await all_end(before)
    assert engine.supervision.restarts["signal"] == 2
    last = processes(engine)
    await engine.close()
    await all_end(last)


@pytest.mark.parametrize("victims", [(1,), pytest.param((2, 0), marks=pytest.mark.nightly)], ids=str)
async def test_any_stage_is_killed_under_load(config: EngineConfig, victims: tuple[int, ...]) -> None:
    with running(config) as core:
        expected = {name: reply.content for name, reply in replies(core, REQUESTS).items()}
    engine = EngineClient(msgspec.structs.replace(config, pipeline_parallel_size=3))
    info = await engine.start()
    assert (info.tensor_parallel_size, info.pipeline_parallel_size) == (1, 3)
    for victim in victims:
        before = processes(engine)
        assert len(before) == 3
        assert await answers(engine, victim) == expected
        assert not {*before} & {*processes(engine)}, "all ranks are started again"
        await all_end(before)
    assert {why: count for why, count in engine.supervision.restarts.items() if count} == {"signal": len(victims)}
    last = processes(engine)
    await engine.close()
    await all_end(last)


async def test_a_hung_rank_ends_with_the_engine_timeout(config: EngineConfig) -> None:
    engine = EngineClient(msgspec.structs.replace(config, tensor_parallel_size=2), engine_timeout=2.0)
    await engine.start()
    before = processes(engine)
    os.kill(before[1], signal.SIGSTOP)  # The other rank waits for the stopped one now.
    await answers(engine)
    assert engine.supervision.restarts["step_timeout"] == 1
    await all_end(before)
    await engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3; it must be one of 1, 2, 4, 8"),
        ({"tensor_parallel_size": 8}, "num_attention_heads is 4, and rank . would have none of it"),
        ({"tensor_parallel_size": 2, "state_cache_host_bytes": 1 << 20}, "state_cache_host_bytes does not work with"),
        (
            {"tensor_parallel_size": 2, "activation_quantization": "int8"},
            "activation_quantization 'int8' and tensor_parallel_exact exclude each other",
        ),
    ],
)
def test_what_several_ranks_cannot_do(config: EngineConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(msgspec.structs.replace(config, **options))


async def test_a_refusal_reaches_the_user(config: EngineConfig) -> None:
    engine = EngineClient(msgspec.structs.replace(config, tensor_parallel_size=8))
    with pytest.raises(ConfigError, match="num_attention_heads is 4, and rank 0 would have none of it"):
        await engine.start()
