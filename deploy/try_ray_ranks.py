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
from concurrent.futures import ThreadPoolExecutor

import httpx
import ray

from deploy.ray_ranks import Cluster
from deploy.trial import PATIENCE, check, processes, say, until

MARK = "TRY_RAY_RANKS"
RANK, SERVER = b"jamba_server.engine.process.rank", b"jamba_server"


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

    [(victim, agent)] = processes(MARK, RANK).items()
    say(f"killing rank 1, process {victim} of node 1")
    os.kill(victim, signal.SIGKILL)
    check("ten more chats have the same texts", [ask(number) for number in range(10)] == before)
    check("the rank is another process of the same node", [*processes(MARK, RANK).values()] == [agent])

    actor = processes(MARK, SERVER)[agent]
    say(f"killing the actor of node 1, process {actor}")
    os.kill(actor, signal.SIGKILL)
    until("its server and its rank end with it", lambda: agent not in processes(MARK, SERVER))
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ask, number) for number in range(10)]
        until("node 1 is started again", lambda: cluster.check() is None and len(processes(MARK, RANK)) == 1)
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
    until("no process is left", lambda: not processes(MARK, RANK) and not processes(MARK, SERVER))
    ray.shutdown()


if __name__ == "__main__":
    main()
