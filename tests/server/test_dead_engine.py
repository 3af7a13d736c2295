"""The server when its engine cannot be restarted: it tells the open streams and ends, or stays and says so."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from jamba_server.engine.errors import EngineDead
from jamba_server.engine.process.client import EngineClient
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.serve import bind, limit_unread
from jamba_server.server.cli.server import Server
from jamba_server.server.cli.terminal import LoadProgress
from jamba_server.server.config import ServerConfig
from jamba_server.server.text.rendering.local import LocalRenderer
from tests.engine.test_client import COMMAND

HANG = {"prompt": [555], "max_tokens": 5, "stream": True}  # the scripted engine hangs in the first step of it


@pytest.fixture(autouse=True)
def scripted_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine that is given up at its first death without a finished step."""
    monkeypatch.setattr("jamba_server.server.cli.server.EngineClient", partial(EngineClient, command=COMMAND))
    monkeypatch.setattr("jamba_server.engine.process.restarts.MAX_FAILURES", 1)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)  # a visitor that fails must not end the tests
    yield
    signal.signal(signal.SIGTERM, handler)


def kill_engine() -> None:
    [engine] = [
        int(pid)
        for thread in Path("/proc/self/task").iterdir()
        for pid in (thread / "children").read_text().split()
        if COMMAND[1] in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(engine, signal.SIGKILL)


def serve(config: ServerConfig, client: Callable[[httpx.Client], None]) -> None:
    """Serves until the server ends, in this thread, with `client` in another one."""
    listener = bind(config.host, 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    failures: list[Exception] = []

    def visit() -> None:
        try:
            with httpx.Client(base_url=address, timeout=60) as http:
                client(http)
        except Exception as error:  # noqa: BLE001 - every failure of the visitor ends the server
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        with listener, LoadProgress(Console(stderr=True)) as progress:
            Server(config, find_checkpoint(config), listener, progress, LocalRenderer()).run()
    finally:
        visitor.join()
        assert failures == []


def test_a_server_that_gives_up_tells_its_streams_and_ends() -> None:
    lines: list[str] = []

    def client(http: httpx.Client) -> None:
        with http.stream("POST", "/v1/completions", json=HANG) as reply:
            kill_engine()
            lines.extend(line for line in reply.iter_lines() if line)

    with pytest.raises(EngineDead, match="gone for good: the engine process ended with signal 9"):
        serve(ServerConfig(served_model_name=("demo",)), client)
    assert '"code":"engine_dead"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_a_server_that_may_stay_stays_and_says_so() -> None:
    def client(http: httpx.Client) -> None:
        while http.get("/ready").status_code != 200:
            time.sleep(0.01)
        kill_engine()
        while (health := http.get("/health")).status_code == 200:
            time.sleep(0.01)
        assert health.json()["status"] == "dead"
        reply = http.post("/v1/completions", json={"prompt": "a"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
        os.kill(os.getpid(), signal.SIGTERM)

    serve(ServerConfig(served_model_name=("demo",), exit_on_dead=False), client)


def test_connections_inherit_the_limit_for_unread_bytes() -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no such option")
    with bind("127.0.0.1", 0) as listener:
        limit_unread(listener, 1.5)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
