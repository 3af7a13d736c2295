"""A second machine, played by processes of their own process group on this one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jamba_server.engine.nodes.client import NodesClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.config_sources import load_config
from tests.engine.parallel.test_parallel_processes import all_end

HOST = "127.0.0.1"
PATIENCE = 300.0
Flags = tuple[str, ...]


def parsed(folder: Path, flags: Flags) -> ServerConfig:
    """The options of a command line. Each flag has a value."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    return load_config({"model": str(folder), **dict(zip(names, flags[1::2], strict=True))}, {})


def first_node(folder: Path, flags: Flags, **settings: Any) -> NodesClient:
    """Returns node 0, which listens at a free port. `settings` are arguments of `EngineClient`."""
    config = parsed(folder, (*flags, "--master-addr", HOST, "--master-port", "0"))
    nodes = config.nodes()
    assert nodes is not None
    return NodesClient(config.engine(folder), nodes, **settings)


class Machine:
    """The process of the agent of a node other than node 0. `log` has the text that it has logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.log = process, ""
        self._reading = asyncio.create_task(self._read())

    @property
    def ranks(self) -> list[int]:
        """The process ids of the node's ranks."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def says(self, text: str) -> None:
        """Waits until the log has a line with this text."""
        async with asyncio.timeout(PATIENCE):
            while not re.search(text, self.log):
                assert not self._reading.done(), f"{text!r} is not in the log:\n{self.log}"
                await asyncio.sleep(0.01)

    async def ends(self) -> int:
        """Waits until the agent has ended, and returns its exit status."""
        async with asyncio.timeout(PATIENCE):
            await self._reading
            return await self.process.wait()

    async def lose(self) -> None:
        """Kills the agent and its ranks, as if the machine had lost its power."""
        ranks = self.ranks
        os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await all_end(ranks)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line.decode()


@asynccontextmanager
async def other_node(folder: Path, flags: Flags, port: int, node: int = 1) -> AsyncGenerator[Machine]:
    """A node other than node 0."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jamba_server", "serve", str(folder), *flags),
        *("--node-rank", str(node), "--master-addr", HOST, "--master-port", str(port)),
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    machine = Machine(process)
    try:
        yield machine
    finally:
        if process.returncode is None:
            await machine.lose()
