"""Measures how long short requests wait for their first token while long prompts, or a request with n = 128, run at the
same time.

    python -m benchmarks.http.latency --name latency [--shape small] [--seconds 60] [--long 30000]

A short request is sent each second. Its time to first token is measured without other load, with one and with four
prompts of `--long` tokens, and with one request of 128 choices. The time of a long prompt is also measured without
other load. There are two requirements. With other load, the 95th percentile of the short requests' times is at most
three times as long as without it, plus one step of the engine. A long prompt takes at most a tenth longer while short
requests run. The results are written to benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from typing import Any

from benchmarks.http.clients import Result, percentile, post
from benchmarks.http.processes import gauges
from benchmarks.http.record import Verdict, measure_server, table, write_results

START_TIMEOUT = 600.0
SHORT_LEN, SHORT_TOKENS = 8, 8
CHOICES, CHOICE_TOKENS = 128, 64
FACTOR = 3.0  # the 95th percentile of the short requests' times may be this many times as long as without other load
LOSS = 0.1  # part of its speed that a long prompt may lose while short requests run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="small", help="model shape, or demo for the demonstration checkpoint")
    parser.add_argument("--seconds", type=int, default=60, help="short requests that are sent alone, one each second")
    parser.add_argument("--long", type=int, default=30_000, help="tokens in a long prompt")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the engine")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a part is given up")
    return parser.parse_args()


class Prompts:
    """Makes random prompts. Each prompt is different, so that none is found in the prefix cache."""

    def __init__(self) -> None:
        self._draw = random.Random(0)

    def body(self, length: int, tokens: int, **fields: Any) -> dict[str, Any]:
        prompt = [self._draw.randrange(3, 1000) for _ in range(length)]
        return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}


async def short_requests(url: str, prompts: Prompts, until: asyncio.Event, results: list[Result]) -> None:
    """Sends a short request each second until the event `until` is set, and then waits for the replies."""
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[Result]]()
    start = loop.time()
    while not until.is_set():
        tasks.append(asyncio.create_task(post(url, prompts.body(SHORT_LEN, SHORT_TOKENS))))
        due = start + len(tasks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                await until.wait()
    results += await asyncio.gather(*tasks)


async def beside(url: str, prompts: Prompts, others: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Sends the requests `others` at the same time, and a short request each second until all of `others` have
    ended."""
    until, shorts = asyncio.Event(), list[Result]()
    sender = asyncio.create_task(short_requests(url, prompts, until, shorts))
    try:
        async with asyncio.timeout(limit):
            heavy = await asyncio.gather(*(post(url, body) for body in others))
    finally:
        until.set()
    await sender
    return {"short": shorts, "heavy": heavy}


async def alone(url: str, prompts: Prompts, seconds: int) -> list[Result]:
    until, shorts = asyncio.Event(), list[Result]()
    sender = asyncio.create_task(short_requests(url, prompts, until, shorts))
    await asyncio.sleep(seconds)
    until.set()
    await sender
    return shorts


def short_summary(results: list[Result]) -> dict[str, Any]:
    first = [result.first for result in results if result.status == 200 and result.first is not None]
    return {
        "requests": len(results),
        "failed": len(results) - len(first),
        "ttft_p50": percentile(first, 0.5) if first else None,
        "ttft_p95": percentile(first, 0.95) if first else None,
        "ttft_max": max(first, default=None),
    }


async def measure(flags: argparse.Namespace, url: str) -> dict[str, Any]:
    prompts = Prompts()
    # These requests only warm the server up and are not measured.
    await asyncio.gather(*(post(url, prompts.body(SHORT_LEN, SHORT_TOKENS)) for _ in range(4)))
    found: dict[str, Any] = {"short alone": short_summary(await alone(url, prompts, flags.seconds))}
    print("short alone", found["short alone"], file=sys.stderr)
    steps = gauges(url).get("jamba_num_steps_total", 0.0)
    start = time.monotonic()
    long_alone = await asyncio.wait_for(post(url, prompts.body(flags.long, 1)), flags.limit)
    found["long alone"] = {"seconds": long_alone.total, "status": long_alone.status}
    steps = gauges(url).get("jamba_num_steps_total", 0.0) - steps
    # If the server has no metric for the number of the engine's steps, the number is estimated: a step on a CPU
    # computes 128 prompt tokens by default.
    found["step"] = (time.monotonic() - start) / (steps or flags.long / 128)
    print("long alone", found["long alone"], file=sys.stderr)
    loads = {
        "one long prompt": [prompts.body(flags.long, 1)],
        "four long prompts": [prompts.body(flags.long, 1) for _ in range(4)],
        f"n = {CHOICES}": [prompts.body(SHORT_LEN, CHOICE_TOKENS, n=CHOICES)],
    }
    for label, others in loads.items():
        result = await beside(url, prompts, others, flags.limit)
        heavy: list[Result] = result["heavy"]
        found[label] = short_summary(result["short"]) | {
            "heavy_seconds": [each.total for each in heavy],
            "heavy_statuses": [each.status for each in heavy],
        }
        print(label, found[label], file=sys.stderr)
    return found


def judge(found: dict[str, Any]) -> list[Verdict]:
    base = found["short alone"]["ttft_p95"]
    allowed = FACTOR * base + found["step"]
    verdicts: list[Verdict] = []
    for label, row in found.items():
        if not isinstance(row, dict) or "heavy_seconds" not in row:
            continue
        p95, failed = row["ttft_p95"], row["failed"]
        required = f"TTFT p95 of short requests beside {label} at most {FACTOR:g} x alone plus one step"
        measured = f"{(p95 or 0) * 1000:.0f} ms; allowed {allowed * 1000:.0f} ms; {failed} failed"
        verdicts.append(Verdict(required, measured, p95 is not None and p95 <= allowed and not failed))
    single, beside_it = found["long alone"]["seconds"], found["one long prompt"]["heavy_seconds"][0]
    loss = 1 - single / beside_it
    required = f"a long prompt beside short requests loses at most {LOSS:.0%} of its speed"
    return [*verdicts, Verdict(required, f"{single:.1f} s alone, {beside_it:.1f} s: {loss:.1%}", loss <= LOSS)]


def to_markdown(found: dict[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for label, row in found.items():
        if not isinstance(row, dict) or "ttft_p95" not in row:
            continue
        times = [f"{(row[name] or 0) * 1000:.0f}" for name in ("ttft_p50", "ttft_p95", "ttft_max")]
        heavy = ", ".join(f"{seconds:.1f}" for seconds in row.get("heavy_seconds", ()))
        rows.append((label, row["requests"], *times, heavy or "-"))
    header = ("short requests beside", "number", "TTFT p50 (ms)", "p95 (ms)", "max (ms)", "the others took (s)")
    note = f"The long prompt alone took {found['long alone']['seconds']:.1f} s; one step of it {found['step']:.3f} s.\n"
    return f"{table(header, rows)}\n{note}"


def main() -> None:
    flags = parse_arguments()
    found, circumstances = measure_server(
        flags.shape,
        ["--threads", str(flags.threads), "--max-model-len", str(flags.long + 1024)],
        lambda url: asyncio.run(measure(flags, url)),
        timeout=START_TIMEOUT,
    )
    title = (
        f"A short request ({SHORT_LEN} tokens in, {SHORT_TOKENS} out) each second, on the shape {flags.shape}; long "
    )
    title += f"prompts have {flags.long} tokens."
    write_results(flags.name, title, circumstances, found, to_markdown(found), judge(found))


if __name__ == "__main__":
    main()
