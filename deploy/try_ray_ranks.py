"""Tries `deploy.ray_ranks` on this machine with the demonstration model, and prints what it sees:

    python -m deploy.try_ray_ranks

Starts Ray, and one server on two bundles with one rank each; sends a streamed chat, kills the rank of node 1, sends ten
chats, kills the actor of node 1 with all that it runs, sends ten chats again, and stops everything. It is not a part of
the tests, because Ray is not installed for them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray

from deploy.ray_ranks import Cluster

PATIENCE = 300.0
MARK = "TRY_RAY_RANKS"
RANK, SERVER = b"jamba_server.engine.process.rank", b"jamba_server"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def check(what: str, fact: bool, shown: object = "") -> None:
    say(f"{what}: {'yes' if fact else 'NO'} {shown}")
    if not fact:
        sys.exit(1)


def until(what: str, done: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.2)
    say(f"{what}: yes")


def processes(module: bytes) -> dict[int, int]:
    """The ids of the processes of this trial that run `python -m MODULE`, with those of their parents."""
    found, mark = dict[int, int](), f"{MARK}={os.getpid()}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if module in command and mark in variables:
            found[int(path.name)] = parent
    return found


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def try_chats(url: str, cluster: Cluster) -> None:
    chat = {"model": "jamba-demo", "max_tokens": 24, "temperature": 0}

    def ask(number: int) -> tuple[int, str]:
        body = {**chat, "messages": [{"role": "user", "content": f"{number}: Tell me a story."}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        return reply.status_code, reply.json()["choices"][0]["message"]["content"]

    body = {**chat, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as reply:
        lines = [line for line in reply.iter_lines() if line]
    check("a streamed chat ends with [DONE]", lines[-1] == "data: [DONE]", f"after {len(lines)} events")
    before = [ask(number) for number in range(10)]
    check("ten chats", [status for status, _ in before] == [200] * 10)

    [(victim, agent)] = processes(RANK).items()
    say(f"killing rank 1, process {victim} of node 1")
    os.kill(victim, signal.SIGKILL)
    check("ten more chats have the same texts", [ask(number) for number in range(10)] == before)
    check("the rank is another process of the same node", [*processes(RANK).values()] == [agent])

    actor = processes(SERVER)[agent]
    say(f"killing the actor of node 1, process {actor}")
    os.kill(actor, signal.SIGKILL)
    until("its server and its rank end with it", lambda: agent not in processes(SERVER))
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ask, number) for number in range(10)]
        until("node 1 is started again", lambda: cluster.check() is None and len(processes(RANK)) == 1)
        check("ten more chats have the same texts", [reply.result() for reply in waiting] == before)


def main() -> None:
    # By this variable the program recognises its own processes.
    environment = {MARK: str(os.getpid())}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    port = free_port()
    arguments = ("--tensor-parallel-size", "2", "--threads", "1", "--port", str(port))
    cluster = Cluster((*arguments, "--master-port", str(free_port())), 2, {"CPU": 1}, strategy="PACK")
    cluster.start()
    url = f"http://127.0.0.1:{port}"
    say(f"ray {ray.__version__}")

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200
        except httpx.TransportError:
            return False

    until("two nodes are ready", is_ready)
    try_chats(url, cluster)
    check("the servers end with status 0", cluster.stop() == [0, 0])
    until("no process is left", lambda: not processes(RANK) and not processes(SERVER))
    ray.shutdown()


if __name__ == "__main__":
    main()
