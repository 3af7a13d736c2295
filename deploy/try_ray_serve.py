"""Tries `deploy.ray_serve` on this machine with the demonstration model, and prints what it sees:

    python -m deploy.try_ray_serve

Starts Ray and two replicas, sends a streamed chat, a conversation whose turns must stay on one replica, and chats from
several clients; kills a replica, sends further chats until there are two replicas again; lets chats wait until a
replica is added; and stops everything. It is not a part of the tests, because Ray is not installed for them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ray
from ray import serve

from deploy.ray_serve import build
from deploy.trial import PATIENCE, check, processes, say, until

URL = "http://127.0.0.1:8199"
MARK = "TRY_RAY_SERVE"


def chat(messages: list[dict[str, str]], **fields: Any) -> httpx.Response:
    body = {"model": "jamba-demo", "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
    return httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=PATIENCE)


def servers() -> dict[int, int]:
    """The process ids of `jamba serve`, each with that of its replica, which are children of this machine's Ray."""
    return processes(MARK, b"jamba_server")


def clients(number: int) -> list[int]:
    """Returns the statuses of `number` chats, eight of them at a time."""

    def one(i: int) -> int:
        return chat([{"role": "user", "content": f"{i}: Tell me a story."}], max_tokens=64).status_code

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(number)))


def try_chats() -> None:
    with httpx.stream(
        "POST",
        f"{URL}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 16},
        timeout=PATIENCE,
    ) as reply:
        lines = [line for line in reply.iter_lines() if line]
    check("a streamed chat ends with [DONE]", lines[-1] == "data: [DONE]", f"after {len(lines)} events")
    check("its content type is that of a stream", reply.headers["content-type"].startswith("text/event-stream"))

    messages: list[dict[str, str]] = []
    cached: list[int] = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Tell me part {turn} of a long story about a dog and its ball."})
        answer = chat(messages).json()
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    check("the turns of a conversation find their prefix", min(cached[1:]) > 0, f"cached tokens {cached}")
    check("24 chats of 8 clients", clients(24) == [200] * 24)
    check("an error is passed on", httpx.get(f"{URL}/v1/nothing", timeout=PATIENCE).status_code == 404)


def try_a_kill() -> None:
    before = servers()
    victim = sorted(before.values())[0]
    say(f"killing replica {victim}")
    os.kill(victim, signal.SIGKILL)
    until("its server ends with it", lambda: len({*servers()} & {*before}) == 1)
    statuses = [chat([{"role": "user", "content": f"{i} after the kill"}]).status_code for i in range(10)]
    say(f"statuses of the next ten chats: {json.dumps(statuses)}")
    until("there are two replicas again", lambda: len(servers()) == 2 and victim not in servers().values())
    until("8 chats of 8 clients", lambda: clients(8) == [200] * 8)


def try_scaling() -> None:
    # A model for two sequences at a time, so that most of 16 chats wait.
    serve.run(build({"min_replicas": 1, "max_replicas": 2, "options": "--threads 1 --max-num-seqs 2"}))
    until("there is one replica", lambda: len(servers()) == 1)
    with ThreadPoolExecutor(16) as pool:
        waiting = [
            pool.submit(
                chat, [{"role": "user", "content": f"{i}: Tell me a story."}], max_tokens=1500, ignore_eos=True, n=2
            )
            for i in range(16)
        ]
        until("a replica is added while chats wait", lambda: len(servers()) == 2)
        check("all of them are answered", [reply.result().status_code for reply in waiting] == [200] * 16)


def main() -> None:
    # By this variable the program recognises its own servers.
    environment = {MARK: str(os.getpid())}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    serve.start(http_options={"host": "127.0.0.1", "port": 8199})
    serve.run(build({"min_replicas": 2, "max_replicas": 2, "options": "--threads 1"}))
    say(f"ray {ray.__version__} with replicas {sorted(servers().values())}")
    check("two replicas", len(servers()) == 2)
    try_chats()
    try_a_kill()
    try_scaling()
    serve.shutdown()
    until("after the stop no server is left", lambda: not servers())
    ray.shutdown()
    left = subprocess.run(["pgrep", "--count", "raylet"], capture_output=True, text=True, check=False).stdout.strip()
    say(f"processes of raylet that are left: {left}")


if __name__ == "__main__":
    main()
