"""Puts vLLM's router (`vllm-router` on PyPI) in front of two servers with the demonstration model and sends it chats.

    python -m benchmarks.http.router --name vllm-router --router PROGRAM [--policies cache_aware,round_robin,...]

PROGRAM is the command `vllm-router`, for example in a virtual environment of its own. For each policy of the router,
two fresh servers are started (`--metrics-names vllm`), and 20 conversations of 5 turns, every other turn streamed, go
through the router. The same conversations then go to a third server without a router, and every reply must be the same
text. Which server has served how much is read from vLLM's names in /metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.http.record import Verdict, conditions, table, write_results
from benchmarks.http.serving import announcement, running_server, stop

CONVERSATIONS, TURNS, REPLY_TOKENS = 20, 5, 16
CLIENTS = 4  # conversations that run at the same time
TIMEOUT = 600.0  # time in seconds in which a server and the router must be ready, and in which a reply must come
SERVER = ["--threads", "1", "--metrics-names", "vllm"]


@dataclass(slots=True)
class Replies:
    """What a run of all conversations got: the reply to each turn by conversation and turn, the numbers of prompt
    tokens and cached prompt tokens by the replies' usage, and the errors."""

    texts: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])
    streamed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    errors: list[str] = field(default_factory=list[str])


@contextmanager
def running_router(program: Path, policy: str, workers: Sequence[str]) -> Generator[str]:
    """Starts the router in front of `workers`, and yields its URL when it serves requests."""
    ports: list[int] = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ports.append(listener.getsockname()[1])
    port, metrics = map(str, ports)
    url = f"http://127.0.0.1:{port}"
    options = ["--port", port, "--prometheus-port", metrics, "--policy", policy, "--worker-startup-check-interval", "1"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [program, "--worker-urls", *workers, *options], stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not serves(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{log.read()[-3000:]}\nThe router is not ready; the end of its log is above.")
                time.sleep(0.2)
            yield url
        finally:
            stop(process)


def serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def converse(url: str) -> Replies:
    """Sends all conversations to `url`, CLIENTS of them at a time."""
    found, turns = Replies(), asyncio.Semaphore(CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:

        async def conversation(number: int) -> None:
            messages: list[dict[str, str]] = []
            async with turns:
                for turn in range(TURNS):
                    messages.append({"role": "user", "content": f"Tell me part {turn + 1} of story {number}."})
                    try:
                        # The router's policy consistent_hash keeps requests with the same session on a server.
                        session = {"x-session-id": f"conversation {number}"}
                        text = await chat(http, messages, session, found, stream=bool((number + turn) % 2))
                    except (httpx.HTTPError, KeyError, ValueError) as error:
                        found.errors.append(f"conversation {number}, turn {turn}: {error!r}")
                        return
                    found.texts[number, turn] = text
                    messages.append({"role": "assistant", "content": text})

        await asyncio.gather(*(conversation(number) for number in range(CONVERSATIONS)))
    return found


async def chat(
    http: httpx.AsyncClient, messages: list[dict[str, str]], headers: dict[str, str], found: Replies, *, stream: bool
) -> str:
    """Returns the reply to `messages`, and adds its numbers of tokens to `found`."""
    body: dict[str, Any] = {"model": "jamba-demo", "messages": messages, "max_tokens": REPLY_TOKENS, "temperature": 0}
    if not stream:
        reply = (await http.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status().json()
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
    else:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, usage, done = "", {}, False
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    usage = event.get("usage") or usage
        if not done:
            raise ValueError("the stream ended without [DONE]")
        found.streamed += 1
    found.prompt_tokens += usage["prompt_tokens"]
    found.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    return text


def requests_served(url: str) -> int:
    """Returns the number of choices that a server has finished, by vLLM's name."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=5).text)
    return int(sum(s.value for f in families for s in f.samples if s.name == "vllm:request_success_total"))


def through_router(program: Path, policy: str) -> tuple[Replies, list[int]]:
    """Returns the replies through the router, and how many each of the two servers has served."""
    with running_server(SERVER, TIMEOUT) as (one, _), running_server(SERVER, TIMEOUT) as (other, _):
        with running_router(program, policy, (one, other)) as url:
            replies = asyncio.run(converse(url))
        return replies, [requests_served(one), requests_served(other)]


def version_of(program: Path) -> str:
    """Returns the version of the package beside the command `program`."""
    code = "from importlib.metadata import version; print(version('vllm-router'))"
    result = subprocess.run([program.parent / "python", "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "of unknown version"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--router", type=Path, required=True, help="the command vllm-router")
    parser.add_argument("--policies", default="cache_aware,consistent_hash,round_robin,power_of_two")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped
    with running_server(SERVER, TIMEOUT) as (url, log):
        direct = asyncio.run(converse(url))
        found = conditions(announcement(log), sys.argv[1:])
    runs = {policy: through_router(flags.router, policy) for policy in flags.policies.split(",")}
    number, rows, verdicts = CONVERSATIONS * TURNS, list[list[object]](), list[Verdict]()
    for policy, (replies, served) in {"no router, one server": (direct, [number]), **runs}.items():
        same = sum(direct.texts.get(place) == text for place, text in replies.texts.items())
        hits = f"{replies.cached_tokens / max(1, replies.prompt_tokens):.1%}"
        rows.append([policy, len(replies.texts), replies.streamed, same, " + ".join(map(str, served)), hits])
        answered = f"{len(replies.texts)} replies, {same} of them the same, {sum(served)} counted, errors: "
        verdicts.append(
            Verdict(
                f"{policy}: {number} replies, all as without a router, all counted by the servers",
                answered + ("; ".join(replies.errors[:3]) or "none"),
                not replies.errors and same == number == sum(served),
            )
        )
    header = ("policy of the router", "replies", "of them streamed", "same text", "served by", "prompt tokens cached")
    title = (
        f"vllm-router {version_of(flags.router)} in front of two servers with the demonstration model: {CONVERSATIONS} "
        f"conversations of {TURNS} turns, {CLIENTS} at a time, with up to {REPLY_TOKENS} tokens a reply."
    )
    content = {"rows": [dict(zip(header, row, strict=True)) for row in rows]}
    write_results(flags.name, title, found, content, table(header, rows), verdicts)


if __name__ == "__main__":
    main()
