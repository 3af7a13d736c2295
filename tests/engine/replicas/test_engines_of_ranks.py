"""Two engines with two ranks each: replies are those of one process, also of an engine whose rank was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.replicas.engines import Engines
from jamba_server.engine.types import Request
from tests.engine.parallel.engines import Reply, replies, running
from tests.engine.parallel.test_parallel_processes import REQUESTS, all_end, processes
from tests.tiny import save_tiny


async def answer(engines: Engines, request: Request) -> Any:
    reply = Reply()
    async with engines.generate([request]) as updates:
        async for update in updates:
            reply.take(update)
    return reply.content


async def test_a_rank_of_one_engine_is_killed_under_load(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        threads=1,
        max_num_seqs=4,
        max_model_len=128,
        kv_cache_memory_bytes=4 << 20,
        state_cache_memory_bytes=4 << 20,
        tensor_parallel_exact=True,
    )
    with running(config) as core:
        expected = [reply.content for reply in replies(core, REQUESTS).values()]
    engines = Engines(msgspec.structs.replace(config, tensor_parallel_size=2), 2)
    info = await engines.start()
    assert info.tensor_parallel_size == 2
    first, second = engines.members
    before, others = processes(first), processes(second)
    assert [len(before), len(others)] == [2, 2]
    answers = [asyncio.create_task(answer(engines, request)) for request in REQUESTS]
    while first.stats.num_steps_total < 20 or second.stats.num_steps_total < 20:
        await asyncio.sleep(0.005)
    os.kill(before[1], signal.SIGKILL)
    assert await asyncio.gather(*answers) == expected
    assert [engine.num_restarts for engine in engines.members] == [1, 0]
    await all_end(before)
    assert processes(second) == others
    await engines.close()
    await all_end(others)
