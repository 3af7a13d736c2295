"""Measures how long short requests wait for their first token while a batch runs, and how fast the batch is.

    python -m benchmarks.http.batch_latency --name batches [--shape small] [--lines 10000] [--pairs 4] [--seconds 25]

A short request is sent every half second. Periods with and without a batch alternate: the batch is cancelled at the end
of its period, and made anew for the next one. The prompts of the batch begin with a common text. Then the batch runs
without other load, and after that a client sends the same requests directly, as many at a time. The requirements are:

* With a batch, the 95th percentile of the short requests' times is at most 1.2 times as long as without it, plus one
  step, which is a step of the batch alone that computes prompts and replies.
* Without other load, the batch has at least nine tenths of the tokens per second that the client gets.
* The common beginning of the batch's prompts is not computed again for each line.

The results are written to benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI

from benchmarks.http.clients import Result, percentile, post
from benchmarks.http.record import Verdict, measure_server, table, write_results

START_TIMEOUT = 600.0
SHORT_LEN, SHORT_TOKENS, SHORT_EVERY = 8, 8, 0.5
COMMON_LEN, OWN_LEN, BATCH_TOKENS = 96, 32, 64  # tokens of each prompt and reply of the batch
FACTOR = 1.2
SHARE = 0.9
WARM_SECONDS = 3.0  # time for which a batch runs before its period begins
MAX_NUM_SEQS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="small", help="model shape, or demo for the demonstration checkpoint")
    parser.add_argument("--lines", type=int, default=10_000, help="lines of the batch")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a period without and with a batch")
    parser.add_argument("--seconds", type=float, default=25.0, help="length of a period")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the engine")
    return parser.parse_args()


class Prompts:
    """Makes random prompts. Those of the batch begin with a common text."""

    def __init__(self) -> None:
        self._draw = random.Random(0)
        self._common = self._tokens(COMMON_LEN)

    def short(self) -> dict[str, Any]:
        return {"prompt": self._tokens(SHORT_LEN), "max_tokens": SHORT_TOKENS, "ignore_eos": True, "stream": True}

    def background(self) -> dict[str, Any]:
        prompt = self._common + self._tokens(OWN_LEN)
        return {"prompt": prompt, "max_tokens": BATCH_TOKENS, "ignore_eos": True, "temperature": 0}

    def file(self, lines: int) -> bytes:
        each = (
            {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": self.background()}
            for i in range(lines)
        )
        return "".join(json.dumps(line) + "\n" for line in each).encode()

    def _tokens(self, number: int) -> list[int]:
        return [self._draw.randrange(3, 1000) for _ in range(number)]


async def short_requests(url: str, prompts: Prompts, seconds: float) -> list[Result]:
    loop = asyncio.get_running_loop()
    tasks, start = list[asyncio.Task[Result]](), loop.time()
    while loop.time() < start + seconds:
        tasks.append(asyncio.create_task(post(url, prompts.short())))
        await asyncio.sleep(max(0.0, start + len(tasks) * SHORT_EVERY - loop.time()))
    return await asyncio.gather(*tasks)


async def reached(client: AsyncOpenAI, batch_id: str, status: str) -> None:
    for _ in range(600):
        if (await client.batches.retrieve(batch_id)).status == status:
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(f"{batch_id} is not {status} after a minute")


@asynccontextmanager
async def batch(client: AsyncOpenAI, prompts: Prompts, lines: int) -> AsyncGenerator[None]:
    """Async context manager: a batch that runs, and is cancelled at the end of the block."""
    file = await client.files.create(file=("in.jsonl", prompts.file(lines)), purpose="batch")
    made = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    await reached(client, made.id, "in_progress")
    await asyncio.sleep(WARM_SECONDS)
    yield
    now = await client.batches.retrieve(made.id)
    assert now.status == "in_progress", f"the batch is too short: {now}"
    await client.batches.cancel(made.id)
    await reached(client, made.id, "cancelled")
    await client.files.delete(file.id)


@dataclass
class Counters:
    """The server's counters of generated tokens, of prompt tokens in and not in the prefix cache, and of steps with
    their duration in seconds, also of mixed steps alone, and the time at which they were read."""

    time: float
    values: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def read(cls, url: str) -> Counters:
        found = cls(time.monotonic())
        for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
            name, _, rest = line.partition("{")
            if name in (
                "jamba_generation_tokens_total",
                "jamba_prefix_cache_queries_total",
                "jamba_prefix_cache_hits_total",
                "jamba_engine_step_seconds_sum",
                "jamba_engine_step_seconds_count",
            ):
                value = float(rest.rpartition(" ")[2])
                found.values[name] = found.values.get(name, 0.0) + value
                if 'kind="mixed"' in rest:
                    found.values[f"{name} mixed"] = value
        return found

    def since(self, before: Counters, name: str) -> float:
        return self.values[f"jamba_{name}"] - before.values[f"jamba_{name}"]


def interval(before: Counters, after: Counters) -> dict[str, float]:
    steps = after.since(before, "engine_step_seconds_count")
    mixed = after.since(before, "engine_step_seconds_count mixed")
    seconds = after.time - before.time
    return {
        "tokens_per_second": after.since(before, "generation_tokens_total") / seconds,
        "step_seconds": after.since(before, "engine_step_seconds_sum") / max(1, steps),
        "mixed_step_seconds": after.since(before, "engine_step_seconds_sum mixed") / max(1, mixed),
        "busy": after.since(before, "engine_step_seconds_sum") / seconds,
        "uncached_prompt_tokens": after.since(before, "prefix_cache_queries_total")
        - after.since(before, "prefix_cache_hits_total"),
        "prompt_tokens": after.since(before, "prefix_cache_queries_total"),
    }


async def direct(url: str, prompts: Prompts, clients: int, seconds: float) -> None:
    """Sends the requests of a batch directly, without a batch. Each of `clients` clients sends one after the other."""

    async def one() -> None:
        while True:
            await post(url, prompts.background())

    tasks = [asyncio.create_task(one()) for _ in range(clients)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def measure(flags: argparse.Namespace, url: str) -> dict[str, Any]:
    prompts, times = Prompts(), dict[str, list[list[Result]]]()
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    await asyncio.gather(*(post(url, prompts.short()) for _ in range(4)))  # these only warm the server up
    found: dict[str, Any] = {"beside": []}
    for _ in range(flags.pairs):
        times.setdefault("alone", []).append(await short_requests(url, prompts, flags.seconds))
        async with batch(client, prompts, flags.lines):
            before = Counters.read(url)
            times.setdefault("beside a batch", []).append(await short_requests(url, prompts, flags.seconds))
            found["beside"].append(interval(before, Counters.read(url)))
        print(summary(times), found["beside"][-1], file=sys.stderr)
    start = Counters.read(url)
    async with batch(client, prompts, flags.lines):
        before = Counters.read(url)
        await asyncio.sleep(flags.seconds)
        after = Counters.read(url)
        found["batch alone"] = interval(before, after)
        found["batch from its start"] = interval(start, after)
    warm = asyncio.create_task(direct(url, prompts, 2 * MAX_NUM_SEQS, flags.seconds + WARM_SECONDS))
    await asyncio.sleep(WARM_SECONDS)
    before = Counters.read(url)
    await asyncio.sleep(flags.seconds - 1)
    found["direct"] = interval(before, Counters.read(url))
    await warm
    with contextlib.suppress(httpx.HTTPError):
        await client.close()
    return found | {
        "short": summary(times),
        "pairs": [summary({k: [v[i]] for k, v in times.items()}) for i in range(flags.pairs)],
    }


def summary(times: dict[str, list[list[Result]]]) -> dict[str, dict[str, float]]:
    """Returns the number of short requests and the percentiles of their times to first token, in seconds."""
    found: dict[str, dict[str, float]] = {}
    for label, periods in times.items():
        results = [result for period in periods for result in period]
        first = [result.first for result in results if result.status == 200 and result.first is not None]
        found[label] = {"requests": len(results), "failed": len(results) - len(first)}
        found[label] |= {f"p{round(100 * share)}": percentile(first, share) for share in (0.5, 0.95)}
        found[label] |= {"max": max(first), "total_p50": percentile([result.total for result in results], 0.5)}
    return found


def judge(found: dict[str, Any]) -> list[Verdict]:
    alone, beside = found["short"]["alone"], found["short"]["beside a batch"]
    # A request that arrives while only the batch runs waits for the end of a step. Most of the time passes in longer
    # steps, which compute prompts and replies.
    step = found["batch alone"]["mixed_step_seconds"]
    allowed = FACTOR * alone["p95"] + step
    share = found["batch alone"]["tokens_per_second"] / found["direct"]["tokens_per_second"]
    whole = found["batch from its start"]
    per_line = whole["uncached_prompt_tokens"] / max(1.0, whole["prompt_tokens"] / (COMMON_LEN + OWN_LEN))
    return [
        Verdict(
            f"TTFT p95 beside a batch at most {FACTOR:g} x that alone plus one step ({step * 1000:.0f} ms)",
            f"{beside['p95'] * 1000:.0f} ms; alone {alone['p95'] * 1000:.0f} ms, allowed {allowed * 1000:.0f} ms; "
            f"{beside['failed']:.0f} failed",
            beside["p95"] <= allowed and not beside["failed"],
        ),
        Verdict(
            f"a batch alone at least {SHARE:g} x as fast as the same requests sent directly",
            f"{found['batch alone']['tokens_per_second']:.0f} and {found['direct']['tokens_per_second']:.0f} tokens/s: "
            f"{share:.2f}",
            share >= SHARE,
        ),
        Verdict(
            f"of a prompt's {COMMON_LEN + OWN_LEN} tokens, at most {OWN_LEN + 17} are computed on average, so the "
            "common beginning is not",
            f"{per_line:.1f}",
            per_line <= OWN_LEN + 17,
        ),
    ]


def to_markdown(found: dict[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for label, row in found["short"].items():
        times = [f"{row[name] * 1000:.0f}" for name in ("p50", "p95", "max", "total_p50")]
        rows.append((label, row["requests"], *times))
    header = ("short requests", "number", "TTFT p50 (ms)", "p95 (ms)", "max (ms)", "whole reply p50 (ms)")
    pairs = ", ".join(
        f"{pair['alone']['p95'] * 1000:.0f} → {pair['beside a batch']['p95'] * 1000:.0f}" for pair in found["pairs"]
    )
    beside = found["beside"]
    speeds = [
        ("a batch beside short requests", sum(each["tokens_per_second"] for each in beside) / len(beside)),
        ("a batch alone", found["batch alone"]["tokens_per_second"]),
        ("the same requests sent directly", found["direct"]["tokens_per_second"]),
    ]
    text = f"{table(header, rows)}\nTTFT p95 alone → beside a batch in each pair of periods (ms): {pairs}.\n\n"
    return text + table(("", "generated tokens/s"), [(label, f"{speed:.0f}") for label, speed in speeds])


def main() -> None:
    flags = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--threads", str(flags.threads), "--max-model-len", "1024", "--max-num-seqs", str(MAX_NUM_SEQS)]
        found, circumstances = measure_server(
            flags.shape,
            [*arguments, "--data-dir", folder],
            lambda url: asyncio.run(measure(flags, url)),
            timeout=START_TIMEOUT,
        )
    title = f"A short request ({SHORT_LEN} tokens in, {SHORT_TOKENS} out) every {SHORT_EVERY:g} s, on the shape "
    title += (
        f"{flags.shape}, without and with a batch of {flags.lines} lines ({COMMON_LEN + OWN_LEN} tokens in, of which "
    )
    title += f"{COMMON_LEN} are common, {BATCH_TOKENS} out)."
    write_results(flags.name, title, circumstances, found, to_markdown(found), judge(found))


if __name__ == "__main__":
    main()
