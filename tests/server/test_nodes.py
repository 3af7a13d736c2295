"""`jamba serve` on two nodes as an operator sees it: two process groups, logs, /ready and exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.server.test_serve_command import COMMAND, children_of

PATIENCE = 120.0
FLAGS = (
    *("--threads", "1", "--max-model-len", "2048", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "64MiB"),
    *("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1"),
)
BODY: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True, "stream": True, "seed": 1}


def until(done: Callable[[], object]) -> Any:
    """Returns the result of `done` when it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


@contextmanager
def machine(log: Path, *flags: str) -> Generator[subprocess.Popen[bytes]]:
    """A node in its own process group, which writes its log to a file."""
    with log.open("wb") as file:
        process = subprocess.Popen((*COMMAND, *FLAGS, *flags), stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stream(http: httpx.Client, half: Callable[[], None] = lambda: None) -> str:
    """The text of a streamed reply. `half` is called after some of it."""
    text, count = "", 0
    with http.stream("POST", "/v1/completions", json=BODY) as reply:
        assert reply.status_code == 200
        for line in filter(None, reply.iter_lines()):
            if line == "data: [DONE]":
                return text
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            count += 1
            if count == 20:
                half()
    raise AssertionError("the stream has no end")


def ready(http: httpx.Client) -> tuple[int, str]:
    reply = http.get("/ready")
    return reply.status_code, reply.json().get("reason") or ""


def test_a_stream_survives_the_loss_of_a_node(tmp_path: Path) -> None:
    first, other, address = tmp_path / "first.log", tmp_path / "other.log", tmp_path / "address"
    with machine(first, "--port", "0", "--master-port", "0", "--address-file", str(address)) as node_0:
        port = until(lambda: re.search(r"node 0 listens at 127\.0\.0\.1:(\d+)\n", first.read_text()))[1]
        flags = ("--node-rank", "1", "--master-port", port)
        with httpx.Client(base_url=until(lambda: address.exists() and address.read_text()), timeout=PATIENCE) as http:
            until(lambda: ready(http) == (503, "node 1 of 2 must join; the engine is loading"))
            assert http.get("/live").status_code == 200
            with machine(other, *flags) as node_1:
                until(lambda: ready(http)[0] == 200)
                expected = stream(http)
                ranks = children_of(node_1.pid)
                assert len(ranks) == 1
                again, second = ExitStack(), list[subprocess.Popen[bytes]]()

                def lose() -> None:
                    """Kills node 1 with its ranks, waits until node 0 has noticed that, and starts it again."""
                    os.killpg(node_1.pid, signal.SIGKILL)
                    node_1.wait()
                    until(lambda: ready(http)[1].startswith("node 1 of 2 must join; the engine process ended"))
                    second.append(again.enter_context(machine(other, *flags)))

                with again:
                    assert stream(http, lose) == expected
                    assert not Path(f"/proc/{ranks[0]}").exists()
                    children = [*children_of(node_0.pid), *children_of(second[0].pid)]
                    node_0.send_signal(signal.SIGTERM)
                    assert node_0.wait(PATIENCE) == 0
                    assert second[0].wait(PATIENCE) == 0
                assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert "node 1 of 2 must still join, at 127.0.0.1:" in first.read_text()
    assert "rank 1 on another node is lost" in first.read_text()
    assert "node 0 has ended: " in other.read_text()
