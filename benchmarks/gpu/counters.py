"""Runs the part `counters` of the GPU check: reads the hardware counters of five kernel calls with Nsight Compute.

    python -m benchmarks.gpu.counters CASE [--device cpu]

is one of the calls, which Nsight Compute starts as a program of its own. The results say how much of the memory
bandwidth and of the tensor cores' time each kernel uses, so that a slow kernel's limit need not be guessed. The clocks
of the GPU stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch

from benchmarks.gpu.cases import Case, Maker, Shape
from benchmarks.gpu.record import Job, Record
from benchmarks.gpu.sweep import config_of
from jamba_server.kernels.table import select

ROOT: Final = Path(__file__).parents[2]
# Sections of Nsight Compute, which exist for every GPU. The names of single metrics differ between GPUs.
SECTIONS: Final = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
# The columns of the table that are kept. All columns are in the log file.
KEPT: Final = re.compile(
    r"gpu__time_duration\.sum|dram.*throughput|sm__throughput\.|pipe_tensor.*pct|warps_active.*pct"
    r"|registers_per_thread$|shared_mem_per_block.*$"
)
LIMIT_SECONDS: Final = 100


class Call(NamedTuple):
    """A kernel call: the name of the model shape, and a function that makes the case."""

    shape: str
    make: Callable[[Maker], Case]
    implementation: str = "triton"


def _of(cases: Any, op: str) -> Case:
    return next(case for case in cases if case.op == op)


CALLS: Final[Mapping[str, Call]] = {
    "in_proj, 1 row": Call("3b", lambda m: m.linear("", 1, m.matrix(2 * m.shape.d, m.shape.h), None)),
    "in_proj, 8192 rows": Call("3b", lambda m: m.linear("", 8192, m.matrix(2 * m.shape.d, m.shape.h), None)),
    "experts int8, 8 rows": Call("mini", lambda m: m.expert_case(8, m.expert_weights(), "int8")),
    "scan, 8192 tokens": Call("3b", lambda m: _of(m.recurrence(1, 8192), "selective_scan")),
    "attention, 64 x 1 of 4096 keys": Call("mini", lambda m: _of(m.attention(64, 1, 4096), "attention_decode")),
    "tiny": Call("tiny", lambda m: m.linear("", 2, m.matrix(2 * m.shape.d, m.shape.h), None), "reference"),
}


def run(job: Job, record: Record) -> None:
    record.start_run(job)
    log = record.path.with_suffix(".log")
    for name in CALLS if job.device == "cuda" else ():
        if name != "tiny":
            record.cell(job.key(name), partial(counted, name, log))


def counted(name: str, log: Path) -> dict[str, Any]:
    """Runs one call under Nsight Compute, and returns its counters for each of the call's kernels."""
    if (ncu := shutil.which("ncu")) is None:
        return {"left_out": "ncu is not installed"}
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    options += [option for section in SECTIONS for option in ("--section", section)]
    command = [ncu, *options, sys.executable, "-m", "benchmarks.gpu.counters", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    with log.open("a") as output:
        output.write(f"== {name}\n{done.stdout}\n{done.stderr}\n")
    if done.returncode:
        raise RuntimeError(f"ncu ended with status {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    return {"kernels": parsed(done.stdout)}


def parsed(text: str) -> list[dict[str, str]]:
    """Returns one dictionary for each kernel: its name, and the counters that KEPT names, with their units.

    `text` is a CSV table of Nsight Compute. Its second line has the units, and other lines may precede the table.
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu printed no table: {text[-800:]}")
    names, units, *rows = list(csv.reader(lines[start:]))
    kept = [(number, name) for number, name in enumerate(names) if KEPT.search(name)]
    where = names.index("Kernel Name")
    return [
        {"kernel": row[where]} | {name: f"{row[number]} {units[number]}".strip() for number, name in kept}
        for row in rows
        if len(row) == len(names)
    ]


def call_once(name: str, device: str) -> None:
    """Makes one call, and before it another one, which compiles the kernels. The profiler sees only the last call."""
    call = CALLS[name]
    case = call.make(Maker(Shape.of(call.shape, config_of(call.shape)), torch.device(device)))
    kernels = select(device, {"all": call.implementation})
    op: Any = getattr(kernels, case.op)
    arguments = case.prepare(kernels)
    op(*arguments)
    if device == "cpu":
        return
    profiler = cast(Any, torch.cuda).cudart()
    torch.cuda.synchronize()
    profiler.cudaProfilerStart()
    op(*arguments)
    torch.cuda.synchronize()
    profiler.cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CALLS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parsed_arguments = parser.parse_args()
    if parsed_arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"No GPU: torch {torch.__version__} sees no NVIDIA GPU.")
    call_once(parsed_arguments.case, parsed_arguments.device)


if __name__ == "__main__":
    main()
