"""Runs the requests of one input file of `jamba run-batch`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.run_batch.callers import Caller, local, remote
from jamba_server.server.cli.run_batch.output import Output
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.batches.endpoints import PATHS
from jamba_server.server.http.batches.job import Contents, read_contents
from jamba_server.server.http.batches.lines import Line
from jamba_server.server.http.batches.order import Order, Pending
from jamba_server.server.http.batches.results import reply_line
from jamba_server.server.http.errors import Stage

MAX_LINES = 10**9  # the file is the user's own, so there is no other limit than the memory
REMOTE_REQUESTS = 64  # number of requests in flight at a server, if the user chooses none


def read_input(path: Path, config: ServerConfig) -> Contents:
    try:
        contents = read_contents(path, PATHS, max_bytes=config.max_body_bytes, max_lines=MAX_LINES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if contents.problem is not None:
        raise ConfigError(f"{path}: {contents.problem[1]}")
    return contents


async def run_file(config: ServerConfig, url: str | None, api_key: str | None, run: Run) -> None:
    if not run.prepare():
        return
    if url is not None:
        async with remote(url, api_key) as caller:
            await run.all(caller, config.max_batch_requests or REMOTE_REQUESTS)
        return
    checkpoint = await asyncio.to_thread(find_checkpoint, config)
    if not config.served_model_name:
        config = replace(config, served_model_name=(checkpoint.name,))
    async with local(config, checkpoint, run.console) as caller:
        await run.all(caller, config.max_batch_requests or 2 * config.max_num_seqs)


class Run:
    """The requests of one input file."""

    def __init__(self, path: Path, contents: Contents, output: Output, console: Console) -> None:
        self.console = console
        self._path, self._contents, self._output = path, contents, output
        self._order = Order([])
        self._freed = asyncio.Event()  # set when a further request may begin

    def prepare(self) -> bool:
        """Writes the results of lines that cannot run, and finds those that an earlier run has not done. Returns
        whether there are any."""
        for result in self._contents.bad:
            error = msgspec.json.decode(result.text)
            if (error["custom_id"], error["error"]["message"]) not in self._output.refused:
                self._output.write(result.text)
        done = self._output.replied
        self._order = Order([line for line in self._contents.pending if self._read(line).custom_id not in done])
        return len(self._order) > 0

    async def all(self, caller: Caller, limit: int) -> None:
        """Runs all requests, at most `limit` at a time."""
        running = set[asyncio.Task[None]]()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            bar = progress.add_task(self._path.name, total=self._contents.total)

            def show() -> None:
                progress.update(bar, completed=len(self._output.replied) + len(self._output.refused))

            try:
                while running or len(self._order):
                    self._freed.clear()
                    while len(running) < limit and (line := self._order.take()) is not None:
                        running.add(asyncio.create_task(self._one(caller, line, show)))
                    await self._freed.wait()
                    for task in [task for task in running if task.done()]:
                        running.remove(task)
                        task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, caller: Caller, line: Pending, show: Callable[[], None]) -> None:
        def on_progress(stage: Stage) -> None:
            if stage == "first_token":
                self._order.computed(line)
                self._freed.set()

        try:
            request = self._read(line)
            outcome = await caller(request.url, bytes(request.body), on_progress)
            self._output.write(reply_line(request.custom_id, outcome))
            show()
        finally:
            self._order.computed(line)
            # The task is not done before this function has returned, so the event is set a moment later.
            asyncio.get_running_loop().call_soon(self._freed.set)

    def _read(self, line: Pending) -> Line:
        with self._path.open("rb") as file:
            file.seek(line.offset)
            return msgspec.json.decode(file.read(line.size), type=Line)
