"""Sends far more requests at once than the server may take, under a limit of 1,024 open files.

    python -m benchmarks.http.overload --name overload [--requests 2000] [--queue 50] [--descriptors 1024]

The server may run `--running` requests at the same time, and `--queue` requests may wait. The program first sends
exactly as many requests as may run and wait. Then it sends `--requests` requests at once, and does that twice. The
requirements are: every request gets status 200, or 503 with the header Retry-After; the 99th percentile of the times of
the admitted requests is at most twice that of the first run; and the server uses no more memory after the second flood
than after the first. The results are written to benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.http.clients import Result, percentile, post
from benchmarks.http.processes import LIMITED, descriptors_of, gauges, memory_of, processes
from benchmarks.http.record import Verdict, measure_server, table, write_results

START_TIMEOUT = 300.0
SETTLE_SECONDS = 10.0  # seconds to wait after a flood, in which connections are closed and memory is freed
MEMORY_SLACK = 1.02
WAIT_FACTOR = 2.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shape", default="demo", help="model shape, or demo for the demonstration checkpoint")
    parser.add_argument("--requests", type=int, default=2000, help="requests that are sent at once")
    parser.add_argument("--running", type=int, default=16, help="replies that may run at the same time")
    parser.add_argument("--queue", type=int, default=50, help="replies that may wait")
    parser.add_argument("--descriptors", type=int, default=1024, help="soft and hard limit of the server's open files")
    parser.add_argument("--output-len", type=int, default=256, help="tokens in each reply")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    return parser.parse_args()


async def flood(url: str, number: int, output_len: int, seed: int) -> list[Result]:
    """Sends `number` requests with different prompts at the same time and returns the results."""
    draw = random.Random(seed)
    bodies = [
        {"prompt": [draw.randrange(3, 1000) for _ in range(16)], "max_tokens": output_len, "ignore_eos": True}
        for _ in range(number)
    ]
    return await asyncio.gather(*(post(url, body) for body in bodies))


def summary(results: list[Result]) -> dict[str, Any]:
    """Returns how often each outcome (status or error) occurred, and percentiles of the times of the admitted and of
    the refused requests, in seconds."""
    outcomes = Counter(
        f"no reply ({result.error})" if not result.status
        else "503 with Retry-After" if result.status == 503 and int(result.headers.get("retry-after", "0")) > 0
        else str(result.status)
        for result in results
    )  # fmt: skip
    admitted = [result.total for result in results if result.status == 200]
    refused = [result.total for result in results if result.status != 200]
    return {
        "outcomes": dict(outcomes),
        "admitted_p50": percentile(admitted, 0.5) if admitted else None,
        "admitted_p99": percentile(admitted, 0.99) if admitted else None,
        "refused_p99": percentile(refused, 0.99) if refused else None,
    }


def measure(flags: argparse.Namespace, url: str) -> dict[str, Any]:
    pids = processes()
    # These requests only warm the server up and are not measured.
    asyncio.run(flood(url, flags.running, flags.output_len, 0))
    time.sleep(1)
    runs: dict[str, dict[str, Any]] = {}
    baseline = flags.running + flags.queue
    plan = {
        "as many as may run and wait": baseline,
        "flood": flags.requests,
        "flood again": flags.requests,
        "as many as may run and wait, afterwards": baseline,
    }
    for seed, (label, number) in enumerate(plan.items(), start=1):
        result = summary(asyncio.run(flood(url, number, flags.output_len, seed)))
        time.sleep(SETTLE_SECONDS)
        runs[label] = {"requests": number, **result, "memory": memory_of(pids), "descriptors": descriptors_of(pids)}
        print(label, runs[label], file=sys.stderr)
    return {"runs": runs, "gauges": gauges(url), "alive": processes() == pids}


def judge(found: dict[str, Any]) -> list[Verdict]:
    runs = found["runs"]
    base, first, second = (runs[label] for label in ("as many as may run and wait", "flood", "flood again"))
    outcomes = Counter(first["outcomes"]) + Counter(second["outcomes"])
    allowed = {"200", "503 with Retry-After"}
    slowest = max(first["admitted_p99"] or 0.0, second["admitted_p99"] or 0.0)
    verdicts = [
        Verdict("only 200, and 503 with Retry-After", str(dict(outcomes)), set(outcomes) <= allowed),
        Verdict("no process has ended", "all live" if found["alive"] else "another process", found["alive"]),
        Verdict(
            f"p99 of the admitted at most {WAIT_FACTOR:g} x that of exactly as many as may run and wait",
            f"{slowest:.2f} s beside {base['admitted_p99']:.2f} s",
            slowest <= WAIT_FACTOR * base["admitted_p99"],
        ),
    ]
    for name, memory in first["memory"].items():
        after = second["memory"].get(name, 0)
        verdicts.append(
            Verdict(
                f"memory of {name} after the second flood at most {MEMORY_SLACK:g} x that after the first",
                f"{after / 2**20:.1f} MiB beside {memory / 2**20:.1f} MiB",
                after <= MEMORY_SLACK * memory,
            )
        )
    same = second["descriptors"] == base["descriptors"]
    measured = f"{second['descriptors']} beside {base['descriptors']}"
    return [*verdicts, Verdict("as many open descriptors as before the floods", measured, same)]


def to_markdown(found: dict[str, Any]) -> str:
    header = ("run", "requests", "outcomes", "p50, p99 of the admitted (s)", "p99 of the refused (s)", "memory (MiB)")
    rows = [
        (
            label,
            run["requests"],
            ", ".join(f"{count} x {outcome}" for outcome, count in run["outcomes"].items()),
            f"{run['admitted_p50'] or 0:.2f}, {run['admitted_p99'] or 0:.2f}",
            f"{run['refused_p99'] or 0:.2f}",
            ", ".join(f"{name} {size / 2**20:.0f}" for name, size in run["memory"].items()),
        )
        for label, run in found["runs"].items()
    ]
    return table(header, rows)


def main() -> None:
    flags = parse_arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # This program needs a file descriptor for the connection of each request.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limits = ["--max-num-seqs", str(flags.running), "--max-queue-requests", str(flags.queue)]
    found, circumstances = measure_server(
        flags.shape,
        [*limits, "--threads", str(flags.threads)],
        lambda url: measure(flags, url),
        timeout=START_TIMEOUT,
        prefix=(*LIMITED, str(flags.descriptors)),
    )
    title = (
        f"{flags.requests} requests at once; {flags.running} replies run and {flags.queue} wait; soft and hard limit "
    )
    title += f"of {flags.descriptors} open files."
    write_results(flags.name, title, circumstances, found, to_markdown(found), judge(found))


if __name__ == "__main__":
    main()
