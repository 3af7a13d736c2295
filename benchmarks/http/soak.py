"""Runs a server for a number of minutes with well-behaved and badly behaved clients, and measures the memory of each
process.

    python -m benchmarks.http.soak --name soak [--minutes 60] [--shape small]

The module visitors.py has the clients. There are four requirements. First, for each process, the largest resident
memory near the end is at most 1.02 times as large as near the beginning (for 60 minutes: minutes 55 to 60 compared with
minutes 5 to 10). Second, after the test no request runs or waits, all state slots and KV pages are free, and no process
has more open descriptors than before. Third, no process has ended. Fourth, no reply has a status of 500 or above,
except 503. The results are written to benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections import Counter, defaultdict
from typing import Any

from benchmarks.http.processes import descriptors_of, gauges, memory_of, processes
from benchmarks.http.record import Verdict, measure_server, table, write_results
from benchmarks.http.visitors import PAUSES, VISITORS, Place

START_TIMEOUT = 600.0
SAMPLE_SECONDS = 5.0  # time between two measurements of memory, in seconds
IDLE_SECONDS = 120.0  # seconds within which all requests must have ended after the clients were stopped
MEMORY_SLACK = 1.02
MIB = 2**20
IDLE_GAUGES = ("jamba_num_requests_running", "jamba_num_requests_waiting", "jamba_kv_cache_usage_perc")
IDLE = (*IDLE_GAUGES, "jamba_state_slots_used")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--minutes", type=float, default=60.0, help="minutes under load")
    parser.add_argument("--shape", default="small", help="model shape, or demo for the demonstration checkpoint")
    parser.add_argument("--context", type=int, default=8192, help="maximum tokens of a sequence")
    parser.add_argument("--longest", type=int, default=4096, help="largest number of tokens in a prompt")
    parser.add_argument("--running", type=int, default=16, help="replies that may run at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument("--seed", type=int, default=0, help="seed of what the clients do")
    return parser.parse_args()


async def keep_visiting(kind: str, place: Place, draw: random.Random, ends: Counter[str]) -> None:
    """Runs one client of the given kind again and again until the task is cancelled, and counts how its requests
    ended."""
    visit = VISITORS[kind][1]
    while True:
        try:
            ends[await visit(place, draw)] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            ends[type(error).__name__] += 1
        await asyncio.sleep(draw.random() * PAUSES.get(kind, 0.05))


async def load(flags: argparse.Namespace, url: str, pids: dict[str, int]) -> dict[str, Any]:
    """Runs all clients for `--minutes` minutes. Returns the measurements of memory, and how the clients' requests
    ended."""
    place, seeds = Place(url, flags.longest), random.Random(flags.seed)
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    clients = [
        asyncio.create_task(keep_visiting(kind, place, random.Random(seeds.random()), ends[kind]))
        for kind, (number, _) in VISITORS.items()
        for _ in range(number)
    ]
    samples: list[tuple[float, dict[str, int]]] = []
    start = time.monotonic()
    shown = -1
    while (elapsed := time.monotonic() - start) < 60 * flags.minutes:
        samples.append((elapsed / 60, memory_of(pids)))
        if int(elapsed / 60) > shown:
            shown = int(elapsed / 60)
            print(f"minute {shown}: {samples[-1][1]} {processes()}", file=sys.stderr, flush=True)
        await asyncio.sleep(SAMPLE_SECONDS)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return {"samples": samples, "ends": {kind: dict(counts) for kind, counts in ends.items()}}


def wait_until_idle(url: str) -> dict[str, float]:
    """Waits until no request runs or waits and all slots and pages are free. Returns the last values of the metrics."""
    deadline = time.monotonic() + IDLE_SECONDS
    while any((values := gauges(url)).get(name, 0) for name in IDLE) and time.monotonic() < deadline:
        time.sleep(1)
    return values


def measure(flags: argparse.Namespace, url: str) -> dict[str, Any]:
    pids = processes()
    place = Place(url, flags.longest)
    # Makes the processes open the files that they keep open, so that these count in both measurements.
    for _, visit in (VISITORS["reads all"], VISITORS["long prompt"]):
        asyncio.run(asyncio.wait_for(_visits(visit, place), START_TIMEOUT))
    wait_until_idle(url)
    before = descriptors_of(pids)
    found = asyncio.run(load(flags, url, pids))
    found |= {"gauges": wait_until_idle(url)}
    time.sleep(2)  # in this time the sockets of the last clients are closed
    return found | {"before": before, "after": descriptors_of(pids), "alive": processes() == pids, "pids": pids}


async def _visits(visit: Any, place: Place) -> None:
    await asyncio.gather(*(visit(place, random.Random(number)) for number in range(16)))


def by_minute(found: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Returns the largest memory of each process in each minute, in bytes."""
    minutes: dict[int, dict[str, int]] = defaultdict(dict)
    for minute, memory in found["samples"]:
        row = minutes[int(minute)]
        for name, size in memory.items():
            row[name] = max(row.get(name, 0), size)
    return dict(minutes)


def largest(found: dict[str, Any], name: str, start: float, end: float) -> int:
    return max((memory.get(name, 0) for minute, memory in found["samples"] if start <= minute < end), default=0)


def judge(found: dict[str, Any], total: float) -> list[Verdict]:
    verdicts: list[Verdict] = []
    early, late = (total / 12, total / 6), (total * 11 / 12, math.inf)
    for name in found["pids"]:
        first, last = largest(found, name, *early), largest(found, name, *late)
        required = f"memory of {name} from minute {late[0]:.3g} on at most {MEMORY_SLACK:g} x that of minutes "
        measured = f"{last / MIB:.1f} MiB beside {first / MIB:.1f} MiB: {last / max(1, first):.3f}"
        verdicts.append(
            Verdict(f"{required}{early[0]:.3g} to {early[1]:.3g}", measured, 0 < last <= MEMORY_SLACK * first)
        )
    values = {name: found["gauges"].get(name) for name in IDLE}
    verdicts.append(
        Verdict("nothing runs or waits; all slots and pages are free", str(values), not any(values.values()))
    )
    more = {name: f"{found['before'][name]} -> {count}" for name, count in found["after"].items()}
    same = all(count <= found["before"][name] for name, count in found["after"].items())
    verdicts.append(Verdict("no more open descriptors than before", str(more), same))
    verdicts.append(
        Verdict("no process has ended", "all live" if found["alive"] else "another process", found["alive"])
    )
    statuses = {end for ends in found["ends"].values() for end in ends if end.isdecimal()}
    bad = sorted(status for status in statuses if int(status) >= 500 and status != "503")
    return [*verdicts, Verdict("no status of 500 or above but 503", ", ".join(bad) or "none", not bad)]


def to_markdown(found: dict[str, Any]) -> str:
    names = list(found["pids"])
    rows = [(minute, *(f"{row.get(n, 0) / MIB:.1f}" for n in names)) for minute, row in by_minute(found).items()]
    visits = [
        (kind, VISITORS[kind][0], ", ".join(f"{count} x {end}" for end, count in sorted(ends.items())))
        for kind, ends in found["ends"].items()
    ]
    memory = table(("minute", *(f"{name} (MiB)" for name in names)), rows)
    return f"Largest resident memory in each minute:\n\n{memory}\n" + table(("client", "number", "visits"), visits)


def main() -> None:
    flags = parse_arguments()
    arguments = ["--max-num-seqs", str(flags.running), "--threads", str(flags.threads)]
    arguments += ["--max-model-len", str(flags.context)]
    found, circumstances = measure_server(
        flags.shape, arguments, lambda url: measure(flags, url), timeout=START_TIMEOUT
    )
    title = f"{flags.minutes:g} minutes of mixed clients on the shape {flags.shape}."
    write_results(flags.name, title, circumstances, found, to_markdown(found), judge(found, flags.minutes))


if __name__ == "__main__":
    main()
