"""Measures the prefix cache's disk tier over HTTP: a long chat before and after a restart, and what writing costs.

    python -m benchmarks.http.tiers --name tiers [--shape small] [--chats 5] [--rounds 10]

A chat has ten turns of 750 new prompt tokens and 50 reply tokens, so its last prompt has about 8,000 tokens. Measured
is the TTFT of the tenth turn, as the median of several chats, in three conditions: the chat is on the device, the
server was stopped by SIGTERM and started again, and the server was killed by SIGKILL right after the tenth turn. Each
condition has other new tokens. The TTFT of 750 tokens without a chat is measured beside it.

What writing costs is measured with two servers, one without tiers. They get the same burst of streams in turn: 8
prompts of 128 tokens with replies of 32 to 96 tokens, so that segments are written while other streams decode. The
result is the median of the ratios of their times per burst. The order of the two servers alternates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec

from benchmarks.http.processes import gauges
from benchmarks.http.record import Verdict, conditions, model_of, table, write_results
from benchmarks.http.serving import announcement, stop, wait_until_ready

TURNS, NEW, REPLY = 10, 750, 50
FIRST_ID, LAST_ID = 300, 1_000  # token ids of prompts, which all shapes have
BURST = 8
START_SECONDS = 300.0


@dataclass
class Server:
    """A server process, which can be killed and started again on the same port."""

    arguments: list[str]
    log: IO[str]
    url: str = ""
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jamba_server", "serve", *self.arguments, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        wait_until_ready(self.process, self.url, self.log, START_SECONDS)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def server(arguments: list[str]) -> Generator[Server]:
    with tempfile.TemporaryFile("a+") as log:
        found = Server(arguments, log)
        try:
            found.start()
            yield found
        finally:
            stop(found.process)


@dataclass
class Turn:
    """The answer to a turn: seconds until the first token, the token ids of the reply, and how many prompt tokens were
    not computed."""

    seconds: float
    token_ids: list[int]
    num_cached: int


async def ask(http: httpx.AsyncClient, url: str, prompt: list[int], max_tokens: int) -> Turn:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    turn, began = Turn(0.0, [], 0), time.perf_counter()
    async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line.removeprefix("data: "))
            for choice in event["choices"]:
                turn.token_ids += choice.get("token_ids") or []
                if turn.token_ids and not turn.seconds:  # the first event may come before the first token
                    turn.seconds = time.perf_counter() - began
            if usage := event.get("usage"):
                turn.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return turn


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


async def talk(http: httpx.AsyncClient, url: str, draw: random.Random, turns: int, history: list[int]) -> list[int]:
    """Returns the tokens of a chat after some more turns."""
    for _ in range(turns):
        prompt = [*history, *tokens(draw, NEW)]
        history = [*prompt, *(await ask(http, url, prompt, REPLY)).token_ids]
    return history


async def last_turns(http: httpx.AsyncClient, url: str, draw: random.Random, chats: list[list[int]]) -> list[Turn]:
    return [await ask(http, url, [*chat, *tokens(draw, NEW)], 1) for chat in chats]


async def measure_chats(disk: Server, number: int) -> dict[str, Any]:
    draw = random.Random(1)
    async with httpx.AsyncClient(timeout=600) as http:
        chats = [await talk(http, disk.url, draw, TURNS - 1, []) for _ in range(number)]
        progress("the chats have nine turns")
        alone = [await ask(http, disk.url, tokens(draw, NEW), 1) for _ in range(number)]
        device = await last_turns(http, disk.url, draw, chats)
        progress("the last turns on the device are measured")
        stop_began = time.perf_counter()
        stop(disk.process)
        stopped = time.perf_counter() - stop_began
        disk.start()
        await asyncio.sleep(2.0)
        await ask(http, disk.url, tokens(draw, NEW), 1)  # the first request of a server is slower
        before = gauges_of(disk.url)
        after_term = await last_turns(http, disk.url, draw, chats)
        read = {name: value - before.get(name, 0) for name, value in gauges_of(disk.url).items()}
        progress("the last turns after SIGTERM are measured")
        grown = [await talk(http, disk.url, draw, 1, chat) for chat in chats]
        disk.kill()
        disk.start()
        await asyncio.sleep(2.0)
        await ask(http, disk.url, tokens(draw, NEW), 1)
        after_kill = await last_turns(http, disk.url, draw, grown)
    lost = [len(chat) - 1 - turn.num_cached for chat, turn in zip(grown, after_kill, strict=True)]
    return {
        "prompt_tokens": [len(chat) + NEW for chat in chats],
        "alone_s": [turn.seconds for turn in alone],
        "device_s": [turn.seconds for turn in device],
        "device_cached": [turn.num_cached for turn in device],
        "restart_s": [turn.seconds for turn in after_term],
        "restart_cached": [turn.num_cached for turn in after_term],
        "restart_read_s": read["restore_seconds"] / number,
        "restart_read_bytes": read["restored_bytes"] / number,
        "stop_s": stopped,
        "kill_s": [turn.seconds for turn in after_kill],
        "kill_cached": [turn.num_cached for turn in after_kill],
        "kill_lost": lost,
    }


def gauges_of(url: str) -> dict[str, float]:
    """Returns what the disk tier has restored."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        for name in ("restore_seconds", "restored_bytes"):
            if line.startswith(f"jamba_prefix_tier_{name}_total") and 'tier="disk"' in line:
                found[name] = float(line.rpartition(" ")[2])
    return found


async def burst(http: httpx.AsyncClient, url: str, seed: int) -> float:
    """Returns the seconds of a burst of streams."""
    draw = random.Random(seed)
    began = time.perf_counter()
    await asyncio.gather(*(ask(http, url, tokens(draw, 128), 32 + 64 * i // (BURST - 1)) for i in range(BURST)))
    return time.perf_counter() - began


async def measure_writing(plain: Server, disk: Server, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"plain": [], "disk": []}
    servers = [("plain", plain), ("disk", disk)]
    async with httpx.AsyncClient(timeout=600) as http:
        for number in range(-1, rounds):
            progress(f"round {number + 1} of {rounds}")
            for name, one in servers if number % 2 else reversed(servers):
                seconds = await burst(http, one.url, 1000 + number)
                if number >= 0:  # the first round warms up
                    times[name].append(seconds)
    ratios = [with_disk / without for without, with_disk in zip(times["plain"], times["disk"], strict=True)]
    written = gauges(disk.url).get("jamba_prefix_tier_written_bytes_total", 0.0)
    return {**times, "ratios": ratios, "written_bytes": written}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="small", help="shape of the model with random weights")
    parser.add_argument("--chats", type=int, default=5, help="0 leaves this part out")
    parser.add_argument("--rounds", type=int, default=10, help="0 leaves this part out")
    options = parser.parse_args(arguments)
    with model_of(options.shape) as model, tempfile.TemporaryDirectory() as folder:
        flags = [*model, "--max-model-len", "16384", "--max-num-seqs", "8"]
        tier = ["--state-cache-disk-path", str(Path(folder) / "cache")]
        with server([*flags, *tier]) as disk:
            chats = asyncio.run(measure_chats(disk, options.chats)) if options.chats else None
            writing = None
            if options.rounds:
                with server(flags) as plain:
                    writing = asyncio.run(measure_writing(plain, disk, options.rounds))
            found = conditions(announcement(disk.log), arguments)
    report(options.name, options.shape, found, chats, writing)


def report(
    name: str, shape: str, found: dict[str, Any], chats: dict[str, Any] | None, writing: dict[str, Any] | None
) -> None:
    verdicts: list[Verdict] = []
    body = ""
    if chats is not None:
        judged, text = report_chats(chats)
        verdicts += judged
        body += text
    if writing is not None:
        judged, text = report_writing(writing)
        verdicts += judged
        body += text
    title = f"A chat of 8,000 tokens with the disk tier of the prefix cache; shape `{shape}`, random weights."
    write_results(name, title, found, {"chats": chats, "writing": writing}, body, verdicts)


def report_chats(chats: dict[str, Any]) -> tuple[list[Verdict], str]:
    medians = {key: statistics.median(chats[f"{key}_s"]) for key in ("alone", "device", "restart", "kill")}
    read, alone = chats["restart_read_s"], medians["alone"]
    lost = max(chats["kill_lost"])
    verdicts = [
        Verdict(
            "turn 10 on the device: at most 1.3 times the TTFT of its new tokens alone",
            f"{medians['device'] / alone:.2f}",
            medians["device"] <= 1.3 * alone,
        ),
        Verdict(
            "turn 10 after SIGTERM: the same plus the time to read",
            f"{(medians['restart'] - read) / alone:.2f} plus {1000 * read:.0f} ms",
            medians["restart"] <= 1.3 * alone + read,
        ),
        Verdict("after SIGKILL at most one turn is lost", f"{lost} tokens", lost <= NEW + REPLY),
    ]
    rows = [
        ("750 tokens without a chat", f"{1000 * alone:.0f}", "0"),
        ("turn 10, chat on the device", f"{1000 * medians['device']:.0f}", statistics.median(chats["device_cached"])),
        ("turn 10, after SIGTERM", f"{1000 * medians['restart']:.0f}", statistics.median(chats["restart_cached"])),
        ("turn 11, after SIGKILL", f"{1000 * medians['kill']:.0f}", statistics.median(chats["kill_cached"])),
    ]
    size = chats["restart_read_bytes"] / 2**20
    body = table(("condition", "TTFT ms, median", "cached tokens, median"), rows)
    body += f"\nA restore read {size:.1f} MiB in {1000 * read:.0f} ms on average. "
    body += f"From SIGTERM to the end of the server: {chats['stop_s']:.1f} s.\n"
    return verdicts, body


def report_writing(writing: dict[str, Any]) -> tuple[list[Verdict], str]:
    cost = statistics.median(writing["ratios"]) - 1
    body = f"\nBursts: {statistics.median(writing['plain']):.2f} s without tiers, "
    body += f"{statistics.median(writing['disk']):.2f} s with the disk tier, medians of {len(writing['ratios'])}; "
    body += f"ratios {', '.join(f'{ratio:.3f}' for ratio in writing['ratios'])}.\n"
    return [Verdict("writing costs at most 2 %", f"{100 * cost:+.1f} %", cost <= 0.02)], body


if __name__ == "__main__":
    main(sys.argv[1:])
