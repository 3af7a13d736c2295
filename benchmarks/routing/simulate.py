"""Compares routing policies for several engines behind one front end, on the arrivals and lengths of published traces.

    python -m benchmarks.routing.simulate --name routing --traces FOLDER

FOLDER has the files azure-llm-trace-2023-conv.csv.xz and -code.csv.xz (see `benchmarks.cache.traces`). Everything is
computed from seeds, so the same arguments give the same numbers on every machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.cache.policies import ROWS as CACHES
from benchmarks.cache.replay import Replay, Simulated, summarize
from benchmarks.cache.traces import MIB, TABLE_COSTS, TIME_SCALE, TOKENS, make_scheduler, sizes_of_small
from benchmarks.http.record import table
from benchmarks.http.serving import RESULTS, describe_commit
from benchmarks.routing.fleet import Fleet
from benchmarks.routing.policies import OTHERS, ROWS, Row
from jamba_server.engine.replicas.routing import DEFAULT
from jamba_server.server.cli.bench.conditions import utc_now
from jamba_server.server.cli.bench.sessions import Session
from jamba_server.server.cli.bench.trees import ChatTrees
from jamba_server.server.cli.bench.workloads import Trace

TRACES = {"conv": "chats", "code": "code completions"}
CACHE_MIB = 128  # MiB for pages and saved states of each engine
STATE_SHARE = 0.25  # the share of these MiB that is for saved states
SEED = 1  # the seed of the model `ChatTrees`; the weights of the router were chosen with seed 0
TEXT = """# {name}

Which engine should get a request? A discrete-event simulation (`benchmarks/routing/`), made by
`python -m benchmarks.routing.simulate {arguments}`
from commit {commit} on {date}. Nothing here is a measurement of time.

* *Requests.* The first {requests} for each engine of the Azure LLM inference traces of 2023 (Microsoft Azure, CC BY
  4.0), with their arrivals and lengths. The arrivals are {conv:g} (chats) and {code:g} (code completions) times as far
  apart, divided by the number of engines, so the load of an engine is about the same in each row.
* *Sharing.* The traces have no text. **Which requests share a prefix is drawn by a model**, `ChatTrees` in
  `server/cli/bench/trees.py`, with seed {seed}: {continued:.0%} of the requests continue one of the {open_chats} chats
  used last, if one is shorter than the prompt; {rewound:.0%} of these replace an earlier turn; chats begin with one of
  {systems} system prompts of {system_least} to {system_most} tokens. The hit rates are those of this model.
* *Engines.* Each is the real scheduler and the real prefix cache, of {mib} MiB, with a simulated model of the shape
  `small`: a step takes {step} ms and besides {prompt_token} ms for a prompt token and {decode} ms for a sequence that
  decodes.
* *Policies.* `random` and `least loaded` know no prefixes. `longest prefix` always follows the prefix. `this server`
  is the code of `--data-parallel-size` (`engine/replicas/routing.py`), with the weights {missing} for a missing token
  and {reply} for a reply. They were chosen with other draws of the model of sharing (seed 0), on the same traces.
* *Numbers.* The hit rate is the share of prompt tokens read from the cache. TTFT is the time to the first token. The
  last column is the most prompt tokens that an engine got, divided by the mean.
"""


def load_sessions(folder: Path, trace: str, count: int, engines: int) -> list[Session]:
    """Makes conversations of the first `count` requests of a trace, as close together as `engines` engines need."""
    path = str(folder / f"azure-llm-trace-2023-{trace}.csv.xz")
    workload = Trace(trace=path, sharing="chats", time_scale=TIME_SCALE[trace] / engines)
    return workload.sessions(np.random.default_rng(SEED), count, TOKENS)


def simulate(sessions: list[Session], row: Row, engines: int) -> dict[str, Any]:
    spec = sizes_of_small()
    members = [
        Simulated(make_scheduler(spec, CACHES[0], CACHE_MIB * MIB, STATE_SHARE), TABLE_COSTS, first_token=1 << (20 + i))
        for i in range(engines)
    ]
    fleet = Fleet(members, row.make(engines))
    found = summarize(fleet.run(Replay(sessions)))
    shares = fleet.prompt_tokens
    return {**found._asdict(), "imbalance": max(shares) * engines / sum(shares)}


def to_markdown(name: str, report: dict[str, Any]) -> str:
    text = TEXT.format(
        name=name,
        **{key: report[key] for key in ("arguments", "commit", "date", "requests")},
        **TIME_SCALE,
        seed=SEED,
        mib=CACHE_MIB,
        **asdict(TABLE_COSTS),
        **DEFAULT._asdict(),
        **msgspec.structs.asdict(ChatTrees()),
    )
    rows = [
        (
            TRACES[row["trace"]],
            row["engines"],
            row["policy"],
            f"{100 * row['hit_rate']:.1f}",
            f"{row['p50']:.2f}",
            f"{row['p95']:.2f}",
            f"{row['imbalance']:.2f}",
        )
        for row in report["rows"]
    ]
    header = ("trace", "engines", "policy", "hit %", "TTFT p50 s", "p95 s", "most / mean")
    return f"{text}\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--traces", type=Path, required=True, help="folder with the traces")
    parser.add_argument("--requests", type=int, default=200, help="requests of a trace for each engine")
    parser.add_argument("--engines", default="2,4,16", help="numbers of engines")
    parser.add_argument("--weights", type=int, default=4, help="number of engines for the rows of other weights")
    flags = parser.parse_args()
    arguments = f"--name {flags.name} --traces FOLDER --requests {flags.requests} --engines {flags.engines}"
    report: dict[str, Any] = {"arguments": arguments, "commit": describe_commit(), "date": utc_now()}
    report |= {"requests": flags.requests, "rows": []}
    for trace in TRACES:
        for engines in map(int, flags.engines.split(",")):
            sessions = load_sessions(flags.traces, trace, flags.requests * engines, engines)
            for row in (*ROWS, *(OTHERS if engines == flags.weights else ())):
                found = simulate(sessions, row, engines)
                report["rows"].append({"trace": trace, "engines": engines, "policy": row.name, **found})
                sys.stderr.write(f"{report['rows'][-1]}\n")
    (RESULTS / f"{flags.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    (RESULTS / f"{flags.name}.md").write_text(to_markdown(flags.name, report))
    sys.stdout.write((RESULTS / f"{flags.name}.md").read_text())


if __name__ == "__main__":
    main()
