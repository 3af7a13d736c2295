"""Measures what a prefill server costs and brings (`--role`): a hand-over in bytes and seconds, and the gaps between
the tokens of a stream on the decode server while long prompts arrive.

    python -m benchmarks.http.prefill_role --name prefill-role [--shape small] [--prompts 7] [--streams 3]

All servers run on this machine. Three arrangements get the same prompts:

* *alone, 1 thread*: one server with one thread;
* *alone, 2 threads*: one server with as many threads as the two servers of the third arrangement together;
* *two servers*: a prefill and a decode server with one thread each, and a folder each, in memory (/dev/shm).

A hand-over is measured twice. The first time the prefill server has to compute the prompt. The second time it has
computed the prompt before, so what is left is the transfer: the list of segments, their files over HTTP, the check, the
message to the engine. Then a stream runs while four clients send long prompts, one after the other each, until the
stream ends. The gaps between the events of the stream are measured. Each event has one token.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.http.record import Verdict, conditions, model_of, table, write_results
from benchmarks.http.serving import announcement
from benchmarks.http.tiers import Server, ask, progress, server, tokens
from jamba_server.engine.disk_tier.folder import files_in, opened
from jamba_server.engine.disk_tier.format import read_header

PROMPT, REPLY, CLIENTS = 2_000, 200, 4
BUDGET = 256  # prompt tokens of a step, the same for all servers
ALONE, BOTH_CORES, PAIR = "alone, 1 thread", "alone, 2 threads", "two servers"


def hand_overs(url: str) -> tuple[int, float, float]:
    """Returns the number of successful hand-overs, and their bytes and seconds."""
    found = dict.fromkeys(("jamba_prefill_hand_overs_total", "bytes", "jamba_prefill_hand_over_seconds_total"), 0.0)
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        name, value = line.partition("{")[0], line.rpartition(" ")[2]
        if name in found and 'result="received"' in line:
            found[name] = float(value)
        elif name == "jamba_prefill_hand_over_bytes_total":
            found["bytes"] = float(value)
    number, num_bytes, seconds = found.values()
    return int(number), num_bytes, seconds


def fingerprint_in(folder: Path) -> str:
    """Returns the fingerprint in the header of a segment."""
    with opened(files_in(folder)[0].path) as file:
        return read_header(file).fingerprint


async def measure_hand_overs(urls: dict[str, str], prefill: Server, folder: Path, number: int) -> dict[str, Any]:
    draw, found = random.Random(1), dict[str, list[float]]()
    equal = True
    async with httpx.AsyncClient(timeout=600) as http:
        for url in urls.values():
            await ask(http, url, tokens(draw, PROMPT), 1)  # the first request of a server is slower
        fingerprint = fingerprint_in(folder)
        for turn in range(number):
            progress(f"hand-over {turn + 1} of {number}")
            prompt, ready = tokens(draw, PROMPT), tokens(draw, PROMPT)
            body = {"prompt": ready[: (PROMPT - 1) // 16 * 16], "fingerprint": fingerprint}
            (await http.post(f"{prefill.url}/v1/prefill", json=body)).raise_for_status()
            replies = dict[str, list[int]]()
            for name, url in urls.items():
                before = hand_overs(url) if name == PAIR else (0, 0.0, 0.0)
                reply = await ask(http, url, prompt, 8)
                found.setdefault(f"ttft, {name}", []).append(reply.seconds)
                replies[name] = reply.token_ids
                if name == PAIR:
                    after = hand_overs(url)
                    assert after[0] == before[0] + 1, "the prompt was handed over"
                    found.setdefault("bytes", []).append(after[1] - before[1])
                    found.setdefault("computed and transferred", []).append(after[2] - before[2])
                    found.setdefault("ttft, computed before", []).append((await ask(http, url, ready, 1)).seconds)
                    found.setdefault("transferred", []).append(hand_overs(url)[2] - after[2])
            equal &= all(reply == replies[ALONE] for reply in replies.values())
    return {"equal": equal, **found}


async def gaps(http: httpx.AsyncClient, url: str, prompt: list[int]) -> list[float]:
    """Returns the seconds between the tokens of a stream."""
    body = {"prompt": prompt, "max_tokens": REPLY, "temperature": 0, "ignore_eos": True, "stream": True}
    times: list[float] = []
    async with http.stream("POST", f"{url}/v1/completions", json=body | {"return_token_ids": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and '"token_ids":[' in line:
                times.append(time.perf_counter())
    return [round(later - earlier, 6) for earlier, later in pairwise(times)]


async def measure_stream(urls: dict[str, str], number: int) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": [], "ttft": []} for name in urls}
    async with httpx.AsyncClient(timeout=600) as http:
        for turn in range(number):
            for name, url in urls.items():
                progress(f"stream {turn + 1} of {number}, {name}")
                draw = random.Random(f"stream {turn}")
                own, figures = tokens(draw, 64), found[name]
                figures["quiet"] += await gaps(http, url, own)
                stream = asyncio.create_task(gaps(http, url, own))

                async def client(seed: str, url: str = url, stream: asyncio.Task[Any] = stream) -> list[float]:
                    draw, seconds = random.Random(seed), list[float]()
                    while not stream.done():
                        seconds.append((await ask(http, url, tokens(draw, PROMPT), 1)).seconds)
                    return seconds

                clients = [client(f"{turn} {name} {number}") for number in range(CLIENTS)]
                for seconds in await asyncio.gather(*clients):
                    figures["ttft"] += seconds
                figures["busy"] += await stream
    return found


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="small", help="shape of the model with random weights")
    parser.add_argument("--prompts", type=int, default=7, help="hand-overs to measure")
    parser.add_argument("--streams", type=int, default=3, help="streams to measure in each arrangement")
    options = parser.parse_args(arguments)
    with model_of(options.shape) as model, tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as stack:
        flags, folder = [*model, "--max-model-len", "4096", "--max-num-seqs", "8"], Path(name)
        flags += ["--max-num-batched-tokens", str(BUDGET)]

        def start(threads: int, *more: str) -> Server:
            return stack.enter_context(server([*flags, "--threads", str(threads), *more]))

        alone, both = start(1), start(2)
        prefill = start(1, "--role", "prefill", "--state-cache-disk-path", str(folder / "prefill"))
        more = ["--role", "decode", "--prefill-url", prefill.url, "--state-cache-disk-path", str(folder / "decode")]
        decode = start(1, *more)
        urls = {ALONE: alone.url, BOTH_CORES: both.url, PAIR: decode.url}
        single = asyncio.run(measure_hand_overs(urls, prefill, folder / "decode", options.prompts))
        streams = asyncio.run(measure_stream(urls, options.streams))
        found = conditions(announcement(decode.log), arguments)
    report(options.name, options.shape, found, single, streams)


def report(name: str, shape: str, found: dict[str, Any], single: dict[str, Any], streams: dict[str, Any]) -> None:
    verdicts = [
        Verdict(
            "the tokens of a reply after a hand-over are those of one server", str(single["equal"]), single["equal"]
        )
    ]
    medians = {key: statistics.median(values) for key, values in single.items() if key != "equal"}
    rows = [
        (f"TTFT, {ALONE}", f"{medians[f'ttft, {ALONE}']:.3f} s"),
        (f"TTFT, {BOTH_CORES}", f"{medians[f'ttft, {BOTH_CORES}']:.3f} s"),
        (f"TTFT, {PAIR}", f"{medians[f'ttft, {PAIR}']:.3f} s"),
        ("of it the hand-over", f"{medians['computed and transferred']:.3f} s"),
        (
            f"TTFT, {PAIR}, the prefill server has computed the prompt before",
            f"{medians['ttft, computed before']:.3f} s",
        ),
        ("of it the hand-over", f"{medians['transferred']:.3f} s"),
        ("bytes of a hand-over", f"{medians['bytes'] / 2**20:.2f} MiB"),
    ]
    body = f"One prompt of {PROMPT:,} tokens at a time. Medians of {len(single['bytes'])} prompts.\n\n"
    body += table(("", "median"), rows)
    body += f"\nThe gaps between the tokens of a stream of {REPLY} tokens, while {CLIENTS} clients send prompts of "
    body += f"{PROMPT:,} tokens, in milliseconds. {len(next(iter(streams.values()))['busy'])} gaps for each row.\n\n"
    lines: list[tuple[object, ...]] = []
    for arrangement, figures in streams.items():
        busy = [1000 * quantile(figures["busy"], share) for share in (0.5, 0.95, 0.99)]
        quiet = 1000 * quantile(figures["quiet"], 0.5)
        lines.append(
            (arrangement, *(f"{value:.1f}" for value in (quiet, *busy)), f"{statistics.median(figures['ttft']):.2f} s")
        )
    header = ("", "without prompts, p50", "p50", "p95", "p99", "TTFT of the prompts")
    body += table(header, lines)
    title = f"A prefill and a decode server beside one server alone; shape `{shape}`, random weights."
    write_results(name, title, found, {"hand_over": single, "streams": streams}, body, verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
