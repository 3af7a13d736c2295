"""Measures what several ranks on this CPU cost: memory of a rank, bytes sent, and time in exchanges.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu.ranks --name ranks-small [--shape small] [--sizes 1,2]

Each rank is a process with one thread and random weights. All ranks run the same steps without a server: decode steps
of 1 and 8 sequences, and the steps of one prompt. The table has medians over the steps. Before the table, the program
checks that all rows in exact mode gave the same tokens and log-probabilities. It writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from benchmarks.cpu.engine import RESULTS
from benchmarks.shapes import SHAPES
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.parallel.group import Group
from jamba_server.engine.parallel.meeting import Meeting
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.start.parallel import alone, join_ranks
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.server.cli.bench.conditions import describe_machine, utc_now

STEPS, WARM_UP, PROMPT = 40, 8, 512
PHASES: Final[Mapping[str, tuple[int, int]]] = {"decode 1": (1, 4), "decode 8": (8, 4), "prompt": (1, PROMPT)}
"""Maps the name of a phase to its number of sequences and the tokens of a prompt."""


def config_of(folder: str, size: int, exact: bool) -> EngineConfig:
    return EngineConfig(
        model=folder, load_format="dummy", dtype="bfloat16", threads=1, max_num_seqs=8, max_model_len=1024,
        max_num_batched_tokens=128, enable_prefix_caching=False, tensor_parallel_size=size,
        tensor_parallel_exact=exact,
    )  # fmt: skip


def run_phase(core: EngineCore, group: Group, name: str) -> dict[str, Any]:
    """Runs the steps of a phase. Returns medians over the steps, and a checksum of all tokens and log-probabilities."""
    clients, length = PHASES[name]
    random, is_prompt = Random(0), name == "prompt"
    tokens = 1 if is_prompt else WARM_UP + STEPS
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=2)
    prompts = [[random.randrange(3, 30_000) for _ in range(length)] for _ in range(clients)]
    core.inbox.submit([Request(id=f"{name} {i}", prompt=prompt, params=params) for i, prompt in enumerate(prompts)])
    steps: list[tuple[float, float, int, int]] = []
    checksum = 0
    while core.inbox.has_submitted or core.has_work:
        traffic, began = group.traffic, time.perf_counter()
        before = traffic.seconds, traffic.num_bytes, traffic.exchanges
        updates = core.step().updates
        seconds = time.perf_counter() - began
        steps.append(
            (seconds, traffic.seconds - before[0], traffic.num_bytes - before[1], traffic.exchanges - before[2])
        )
        got = [(u.request_id, u.token_ids, [(p.token_id, p.logprob) for p in u.logprobs]) for u in updates]
        checksum = zlib.crc32(repr(got).encode(), checksum)
    counted = steps if is_prompt else steps[WARM_UP:]
    names = ("step", "exchanging", "bytes", "exchanges")
    medians = {kind: statistics.median(values) for kind, values in zip(names, zip(*counted, strict=True), strict=True)}
    return {**medians, "checksum": checksum}


def memory_of_process() -> int:
    """Returns the bytes of memory that only this process has, in use."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines[1:])}
    return (fields["Private_Clean"] + fields["Private_Dirty"]) * 1024


def run_rank(folder: str, size: int, exact: bool, rank: int, store: str) -> dict[str, Any]:
    """Runs all phases as one rank."""
    config = config_of(folder, size, exact)
    joined = (
        alone(config, load_model_config(Path(folder))) if size == 1 else join_ranks(config, rank, Meeting(path=store))
    )
    core, group = build_engine(config, joined=joined), joined.group
    run_phase(core, group, "decode 1")  # the first steps also make the buffers of exchanges
    phases = {name: run_phase(core, group, name) for name in PHASES}
    info = core.info
    sizes = {"weights": info.weight_bytes, "pages": info.kv_bytes, "states": info.state_bytes}
    return {"phases": phases, "memory": memory_of_process(), **sizes, "kernels": info.kernels["linear"]}


def measure(folder: str, size: int, exact: bool) -> list[dict[str, Any]]:
    """Starts the ranks and returns what each of them reports."""
    with tempfile.TemporaryDirectory() as place:
        arguments = (folder, str(size), str(int(exact)))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.cpu.ranks", "--rank", str(rank), *arguments, f"{place}/store"],
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def rows(shape: str, sizes: list[int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
        for size in sizes:
            for exact in (False, True):
                yield f"{size}, {'exact' if exact else 'plain'}", measure(folder, size, exact)


def describe(shape: str, found: Mapping[str, list[dict[str, Any]]]) -> str:
    machine = describe_machine()
    lines = [
        f"`{shape}`, bfloat16, one thread a rank, {machine.cpu}, {machine.cores} cores, {utc_now()}.",
        "",
        "| ranks | process, MB | weights, MB | caches, MB | phase | step, ms | exchanging, ms | exchanges | KB sent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, ranks in found.items():
        first = ranks[0]
        memory = " / ".join(f"{rank['memory'] / 1e6:,.0f}" for rank in ranks)
        sizes = f"{first['weights'] / 1e6:,.1f} | {(first['pages'] + first['states']) / 1e6:,.1f}"
        for phase, values in first["phases"].items():
            lines.append(
                f"| {name} | {memory} | {sizes} | {phase} | {1e3 * values['step']:.2f} | "
                f"{1e3 * values['exchanging']:.2f} | {values['exchanges']:.0f} | {values['bytes'] / 1e3:,.1f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="ranks-small")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--rank", nargs=5, metavar=("RANK", "FOLDER", "SIZE", "EXACT", "STORE"), help="runs one rank")
    options = parser.parse_args()
    if options.rank:
        rank, folder, size, exact, store = options.rank
        print(json.dumps(run_rank(folder, int(size), exact == "1", int(rank), store)))
        return
    found = dict(rows(options.shape, [int(size) for size in options.sizes.split(",")]))
    exact = [ranks for name, ranks in found.items() if name.endswith("exact")]
    sums = {tuple(phase["checksum"] for phase in rank["phases"].values()) for ranks in exact for rank in ranks}
    if len(sums) != 1:
        raise SystemExit(f"the ranks computed {len(sums)} different results in exact mode; there must be one")
    text = f"# {options.name}\n\n{describe(options.shape, found)}"
    (RESULTS / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
