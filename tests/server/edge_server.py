"""The application behind `HttpServer`, which accepts its own connections, and a connection without a network."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from jamba_server.server.cli.server import http_config
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections.protocol import Connection, Manner
from jamba_server.server.http.connections.server import HttpServer
from tests.server.conftest import Bench

SECONDS = 10.0  # only a test that fails ever waits for it


@asynccontextmanager
async def edge_server(bench: Bench, **settings: Any) -> AsyncGenerator[tuple[HttpServer, int]]:
    """Runs a server, and yields it with its port. `settings` are arguments of `HttpServer`."""
    services = bench.app.state.services
    config: ServerConfig = services.config
    defaults: dict[str, Any] = {"max_connections": 100, "header_timeout": config.header_timeout}
    defaults["send_timeout"] = config.send_timeout
    with socket.create_server(("127.0.0.1", 0)) as listener:
        defaults["counts"] = services.edge.connections
        server = HttpServer(http_config(config, bench.app), listener, **(defaults | settings))
        task = asyncio.create_task(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.005)
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


class Timer:
    """A call that a `FakeLoop` makes when a test says so."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.cancelled = seconds, call, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """The running loop, except that timers never expire by themselves."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, call: Callable[..., None], *arguments: object) -> Timer:
        self.timers.append(Timer(seconds, partial(call, *arguments)))
        return self.timers[-1]

    def create_task(self, work: Any) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    @property
    def pending(self) -> list[float]:
        return [timer.seconds for timer in self.timers if not timer.cancelled]

    def expire(self) -> None:
        """The only pending timer expires."""
        [timer] = [timer for timer in self.timers if not timer.cancelled]
        timer.cancel()
        timer.call()


class FakeTransport:
    """What a connection has written, and whether it is closed or aborted. `unread` bytes wait for the client."""

    def __init__(self) -> None:
        self.written, self.closed, self.aborted, self.unread = b"", False, False, 0

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> object:
        return None

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class FakeConnection:
    """A `Connection` of an application, with a fake loop and transport. The method `sends` sends data to it, as its
    client would."""

    def __init__(self, bench: Bench, *, refused: bool = False, crowded: bool = False) -> None:
        config = http_config(bench.app.state.services.config, bench.app)
        self.loop, self.transport, self.num_lost = FakeLoop(), FakeTransport(), 0
        manner = Manner(
            header_seconds=20.0, send_seconds=60.0, refused=refused, crowded=lambda: crowded, lost=self._lose
        )
        self._state = _ServerState()
        self.protocol = Connection(config, self._state, {}, manner)  # pyright: ignore[reportArgumentType]
        self.protocol.loop = self.loop  # pyright: ignore[reportAttributeAccessIssue]
        self.protocol.connection_made(self.transport)  # pyright: ignore[reportArgumentType]

    def _lose(self) -> None:
        self.num_lost += 1

    async def sends(self, data: bytes) -> None:
        """Gives data to the connection, and waits until the tasks that this starts have ended."""
        self.protocol.data_received(data)
        tasks = list(self._state.tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=0.2)

    async def finish(self) -> None:
        self.protocol.connection_lost(None)
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=SECONDS)


class _ServerState:
    def __init__(self) -> None:
        self.total_requests = 0
        self.connections: set[object] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.default_headers: list[tuple[bytes, bytes]] = []
