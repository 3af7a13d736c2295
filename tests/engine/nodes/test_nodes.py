"""An engine on two nodes: it answers as one process does, also after ranks or a whole node were lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.nodes.client import NodesClient
from jamba_server.engine.types import Request
from tests.engine.nodes.machines import HOST, PATIENCE, Flags, first_node, other_node, parsed
from tests.engine.parallel.engines import Reply, replies, running
from tests.engine.parallel.test_parallel_processes import PARAMS, REQUESTS, all_end, processes
from tests.nightly import nightly
from tests.tiny import save_tiny

TINY: Flags = (
    *("--dtype", "float32", "--threads", "1", "--max-num-seqs", "4", "--max-model-len", "128"),
    *("--kv-cache-memory-bytes", "4MiB", "--state-cache-memory-bytes", "4MiB", "--nnodes", "2"),
)
TENSOR: Flags = (*TINY, "--tensor-parallel-size", "2")
STAGES: Flags = (*TINY, "--pipeline-parallel-size", "2")
BOTH: Flags = (*TENSOR, "--pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    save_tiny(folder)
    return folder


@cache
def expected(folder: Path, *, exact: bool) -> dict[str, Any]:
    """What one process answers. With `exact`, it adds as the ranks of tensor parallelism do."""
    config = parsed(folder, (*TINY, "--master-addr", HOST)).engine(folder)
    with running(msgspec.structs.replace(config, nnodes=1, tensor_parallel_exact=exact)) as core:
        return {name: reply.content for name, reply in replies(core, REQUESTS).items()}


async def answers(engine: NodesClient, at_half: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What the engine answers. `at_half` is called when half of it is there."""
    found, count = {request.id: Reply() for request in REQUESTS}, 0
    async with asyncio.timeout(PATIENCE), engine.generate(list[Request](REQUESTS)) as stream:
        async for update in stream:
            found[update.request_id].take(update)
            count += 1
            if count == len(REQUESTS) * PARAMS.max_tokens // 2:
                at_half()
    return {name: reply.content for name, reply in found.items()}


async def until_awaited(engine: NodesClient, awaited: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while engine.coordinator.awaited != awaited:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("flags", "per_node"), [(BOTH, 2), *nightly([(TENSOR, 1), (STAGES, 1)])], ids=["both", "tensor", "stages"]
)
async def test_two_nodes_answer_as_one_process(folder: Path, flags: Flags, per_node: int) -> None:
    engine = first_node(folder, flags)
    async with other_node(folder, flags, engine.coordinator.address[1]) as machine:
        await engine.start()
        ranks = [*processes(engine), *machine.ranks]
        assert [len(processes(engine)), len(machine.ranks)] == [per_node, per_node]
        assert await answers(engine) == expected(folder, exact=flags is not STAGES)
        await engine.close()
        assert await machine.ends() == 0
        assert "node 0 has ended" in machine.log
        await all_end(ranks)


async def test_streams_go_on_when_a_rank_or_a_whole_node_is_lost(folder: Path) -> None:
    content = expected(folder, exact=True)
    engine = first_node(folder, TENSOR)
    port = engine.coordinator.address[1]
    async with other_node(folder, TENSOR, port) as machine:
        await engine.start()
        before = [*processes(engine), *machine.ranks]
        assert await answers(engine, lambda: os.kill(machine.ranks[0], signal.SIGKILL)) == content
        await all_end(before)
        assert machine.process.returncode is None, "the agent stays"
        before = [*processes(engine), *machine.ranks]
        assert await answers(engine, lambda: os.kill(before[0], signal.SIGKILL)) == content
        await all_end(before)

        lost = asyncio.create_task(answers(engine, lambda: os.killpg(machine.process.pid, signal.SIGKILL)))
        await until_awaited(engine, "node 1 of 2")
        assert (engine.health.alive, engine.health.ready) == (True, False)
        assert engine.health.reason.startswith("node 1 of 2 must join")
        assert await machine.ends() == -signal.SIGKILL
    async with other_node(folder, TENSOR, port) as machine:
        assert await lost == content
        assert {why: count for why, count in engine.supervision.restarts.items() if count} == {"signal": 3}
        await engine.close()
        assert await machine.ends() == 0


async def test_a_hung_rank_of_another_node_ends_with_the_engine_timeout(folder: Path) -> None:
    engine = first_node(folder, STAGES, engine_timeout=2.0)
    async with other_node(folder, STAGES, engine.coordinator.address[1]) as machine:
        await engine.start()
        before = [*processes(engine), *machine.ranks]
        os.kill(machine.ranks[0], signal.SIGSTOP)  # Node 0 waits for its tokens now.
        assert await answers(engine) == expected(folder, exact=False)
        assert engine.supervision.restarts["step_timeout"] == 1
        await all_end(before)
        await engine.close()


async def test_a_node_that_leaves_is_awaited_and_node_0_can_stop_meanwhile(folder: Path) -> None:
    engine = first_node(folder, STAGES)
    async with other_node(folder, STAGES, engine.coordinator.address[1]) as machine:
        await engine.start()
        ranks = [*processes(engine), *machine.ranks]
        machine.process.terminate()
        assert await machine.ends() == 0
        assert "SIGTERM: node 1 leaves" in machine.log
        await until_awaited(engine, "node 1 of 2")
        await all_end(ranks)
    async with asyncio.timeout(PATIENCE):
        await engine.close()


async def test_a_rank_that_cannot_load_ends_all(folder: Path, tmp_path: Path) -> None:
    """The reason is that of the rank, and the agent ends with status 1."""
    flags = (*STAGES, "--kernels", "linear=triton")
    engine = first_node(folder, flags)
    async with other_node(folder, flags, engine.coordinator.address[1]) as machine:
        with pytest.raises(ConfigError, match="triton"):
            await engine.start()
        await engine.close()
        assert await machine.ends() == 1
        assert "node 0 has ended: " in machine.log


async def test_another_processor_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank computes by itself must have the same bits everywhere."""
    engine = first_node(folder, STAGES)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # for the other node
    async with other_node(folder, STAGES, engine.coordinator.address[1]) as machine:
        monkeypatch.delenv("ATEN_CPU_CAPABILITY")
        with pytest.raises(ConfigError, match=r"node 1 computes with .* DEFAULT .*, but node 0 with "):
            await engine.start()
        await engine.close()
        assert await machine.ends() == 1
