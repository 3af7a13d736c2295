"""Measures the prefix cache's disk tier over HTTP: a long chat before and after a restart, and what writing costs.

    python -m benchmarks.http.tiers --name tiers [--shape small] [--chats 7] [--rounds 24]

A chat has ten turns of 750 new prompt tokens and 50 reply tokens, so its last prompt has about 8,000 tokens. Measured
is the TTFT of the tenth turn in three conditions: the chat is on the device, the server was stopped by SIGTERM and
started again, and the server was killed by SIGKILL right after the tenth turn. Each time, 750 new tokens without a chat
are sent to the same server just before or just after, in turns, because the speed of the machine changes during the
measurement. The ratio of such a pair is free from most of these changes; the median of the pairs counts. The time that
the server itself reports for reading from the disk is taken off the turn's time before.

What writing costs is measured with two servers, one without tiers. They get the same burst of requests in turn: 8
clients, each of which sends 3 prompts of 128 tokens one after the other and reads replies of 32 to 96 tokens, so that
segments are written while other sequences decode. The result is the median of the ratios of their times for a burst;
the order of the two servers alternates, and the next burst begins when everything is written. The processor time of
both engines is compared too. It includes the threads that write, and depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import math
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec

from benchmarks.http.processes import gauges
from benchmarks.http.record import Verdict, conditions, model_of, table, write_results
from benchmarks.http.serving import announcement, stop, wait_until_ready
from benchmarks.http.shapes import descendants

TURNS, NEW, REPLY = 10, 750, 50
ALLOWED = 1.3  # the most that the TTFT of the tenth turn may be, as a multiple of that of its new tokens alone
FIRST_ID, LAST_ID = 300, 1_000  # token ids of prompts, which all shapes have
BURST, REQUESTS = 8, 3  # clients of a burst, and requests of each of them
TICKS = os.sysconf("SC_CLK_TCK")  # units of processor time in a second
STEP = 192  # prompt tokens of a step; without it the two servers might choose different numbers
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


@dataclass(frozen=True)
class Pair:
    """The tenth turn of a chat, and as many new tokens without a chat. `read` are the seconds that the server has spent
    on bringing the chat from the disk, and `read_bytes` is the size of what it brought."""

    alone: float
    turn: float
    num_cached: int
    read: float
    read_bytes: float

    @property
    def ratio(self) -> float:
        return (self.turn - self.read) / self.alone


async def last_turns(
    http: httpx.AsyncClient, url: str, draw: random.Random, chats: list[list[int]], *, on_device: bool = False
) -> list[Pair]:
    await ask(http, url, tokens(draw, NEW), 1)  # the first request of a server is slower
    pairs: list[Pair] = []
    for number, chat in enumerate(chats):
        if on_device:  # brings the chat to the device again if the other chats have evicted it
            await ask(http, url, [*chat, *tokens(draw, 1)], 1)
        before = gauges_of(url)
        turns: dict[str, Turn] = {}
        for kind in ("alone", "chat") if number % 2 else ("chat", "alone"):
            history = chat if kind == "chat" else []
            turns[kind] = await ask(http, url, [*history, *tokens(draw, NEW)], 1)
        read = {name: value - before.get(name, 0.0) for name, value in gauges_of(url).items()}
        pairs.append(
            Pair(
                turns["alone"].seconds,
                turns["chat"].seconds,
                turns["chat"].num_cached,
                read.get("restore_seconds", 0.0),
                read.get("restored_bytes", 0.0),
            )
        )
    return pairs


async def measure_chats(disk: Server, number: int) -> dict[str, Any]:
    draw = random.Random(1)
    async with httpx.AsyncClient(timeout=600) as http:
        chats = [await talk(http, disk.url, draw, TURNS - 1, []) for _ in range(number)]
        progress("the chats have nine turns")
        device = await last_turns(http, disk.url, draw, chats, on_device=True)
        progress("the last turns on the device are measured")
        stop_began = time.perf_counter()
        stop(disk.process)
        stopped = time.perf_counter() - stop_began
        disk.start()
        await asyncio.sleep(2.0)
        after_term = await last_turns(http, disk.url, draw, chats)
        progress("the last turns after SIGTERM are measured")
        grown = [await talk(http, disk.url, draw, 1, chat) for chat in chats]
        disk.kill()
        disk.start()
        await asyncio.sleep(2.0)
        after_kill = await last_turns(http, disk.url, draw, grown)
    lost = [len(chat) - 1 - pair.num_cached for chat, pair in zip(grown, after_kill, strict=True)]
    found = {"device": device, "restart": after_term, "kill": after_kill}
    return {
        "prompt_tokens": [len(chat) + NEW for chat in chats],
        "stop_s": stopped,
        "kill_lost": lost,
        "pairs": {name: [{**asdict(pair), "ratio": pair.ratio} for pair in pairs] for name, pairs in found.items()},
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
    """Returns the seconds of a burst of requests."""
    draw = random.Random(seed)
    prompts = [[tokens(draw, 128) for _ in range(REQUESTS)] for _ in range(BURST)]

    async def client(number: int) -> None:
        for prompt in prompts[number]:
            await ask(http, url, prompt, 32 + 64 * number // (BURST - 1))

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(BURST)))
    return time.perf_counter() - began


def wait_until_written(url: str) -> None:
    while gauges(url).get("jamba_prefix_tier_staged_bytes", 0.0):
        time.sleep(0.05)


def engine_seconds(one: Server) -> float:
    """Returns the processor time of a server's engine process, with all of its threads, in seconds."""
    for pid in descendants(one.process.pid):
        if b"jamba_server.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13])) / TICKS
    sys.exit("The server has no engine process.")


async def measure_writing(plain: Server, disk: Server, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"plain": [], "disk": []}
    work: dict[str, list[float]] = {"plain": [], "disk": []}
    servers = [("plain", plain), ("disk", disk)]
    async with httpx.AsyncClient(timeout=600) as http:
        for number in range(-1, rounds):
            progress(f"round {number + 1} of {rounds}")
            for name, one in servers if number % 2 else reversed(servers):
                before = engine_seconds(one)
                seconds = await burst(http, one.url, 1000 + number)
                wait_until_written(one.url)
                if number >= 0:  # the first round warms up
                    times[name].append(seconds)
                    work[name].append(engine_seconds(one) - before)
    written = gauges(disk.url)
    return {
        **times,
        "ratios": [disk / plain for plain, disk in zip(times["plain"], times["disk"], strict=True)],
        "work_plain": work["plain"],
        "work_disk": work["disk"],
        "written_bytes": written.get("jamba_prefix_tier_written_bytes_total", 0.0),
        "written_segments": written.get("jamba_prefix_tier_written_segments_total", 0.0),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns an interval that has the median of the distribution with a probability of about 95 %, by the order
    statistics of the values."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    middle = (len(values) - 1) / 2
    return ordered[max(0, math.floor(middle - half))], ordered[min(len(ordered) - 1, math.ceil(middle + half))]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="small", help="shape of the model with random weights")
    parser.add_argument("--chats", type=int, default=7, help="0 leaves this part out")
    parser.add_argument("--rounds", type=int, default=24, help="0 leaves this part out")
    options = parser.parse_args(arguments)
    with model_of(options.shape) as model, tempfile.TemporaryDirectory() as folder:
        flags = [*model, "--max-model-len", "16384", "--max-num-seqs", "8", "--max-num-batched-tokens", str(STEP)]
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
    pairs: dict[str, list[dict[str, float]]] = chats["pairs"]
    ratios = {name: [pair["ratio"] for pair in found] for name, found in pairs.items()}
    shown = {
        name: "{:.2f} ({:.2f} to {:.2f})".format(statistics.median(values), *interval(values))
        for name, values in ratios.items()
    }
    lost = max(chats["kill_lost"])
    verdicts = [
        Verdict(
            f"turn 10 on the device: at most {ALLOWED} times the TTFT of its new tokens alone",
            shown["device"],
            statistics.median(ratios["device"]) <= ALLOWED,
        ),
        Verdict(
            "turn 10 after SIGTERM: the same plus the time to read",
            shown["restart"],
            statistics.median(ratios["restart"]) <= ALLOWED,
        ),
        Verdict("after SIGKILL at most one turn is lost", f"{lost} tokens", lost <= NEW + REPLY),
    ]
    conditions = {
        "device": "turn 10, chat on the device",
        "restart": "turn 10, after SIGTERM",
        "kill": "turn 11, after SIGKILL",
    }
    rows: list[tuple[object, ...]] = []
    for name, text in conditions.items():
        medians = {key: statistics.median(pair[key] for pair in pairs[name]) for key in pairs[name][0]}
        times = (f"{1000 * medians[key]:.0f}" for key in ("alone", "turn", "read"))
        size = f"{medians['read_bytes'] / 2**20:.1f}"
        rows.append((text, *times, size, shown[name], int(medians["num_cached"])))
    header = (
        "condition",
        "alone, ms",
        "turn, ms",
        "reading, ms",
        "read, MiB",
        "(turn - reading) / alone",
        "cached tokens",
    )
    body = f"TTFT of 750 new tokens, alone and at the end of a chat. Medians of {len(pairs['device'])} pairs, "
    body += "in parentheses an interval that has the median with a probability of 95 %.\n\n" + table(header, rows)
    return verdicts, f"{body}\nFrom SIGTERM to the end of the server: {chats['stop_s']:.1f} s.\n"


def report_writing(writing: dict[str, Any]) -> tuple[list[Verdict], str]:
    cost, bounds = statistics.median(writing["ratios"]) - 1, interval(writing["ratios"])
    shown = "{:+.1f} % ({:+.1f} to {:+.1f})".format(100 * cost, *(100 * (bound - 1) for bound in bounds))
    plain, disk = sum(writing["work_plain"]), sum(writing["work_disk"])
    body = f"\nBursts of {BURST * REQUESTS} requests: {statistics.median(writing['plain']):.2f} s without tiers, "
    body += f"{statistics.median(writing['disk']):.2f} s with the disk tier, medians of {len(writing['ratios'])}; "
    body += f"ratios {', '.join(f'{ratio:.3f}' for ratio in writing['ratios'])}. In all, "
    body += f"{writing['written_segments']:.0f} segments with {writing['written_bytes'] / 2**20:.0f} MiB were written. "
    body += f"Processor time of the engine: {plain:.1f} s without tiers, {disk:.1f} s with the disk tier "
    body += f"({100 * (disk / plain - 1):+.1f} %).\n"
    return [Verdict("writing costs at most 2 %", shown, cost <= 0.02)], body


if __name__ == "__main__":
    main(sys.argv[1:])
