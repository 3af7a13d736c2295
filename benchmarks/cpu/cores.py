"""Predicts the speed of decoding on machines with many cores, from what one and two cores of this machine do.

    python -m benchmarks.cpu.cores --name many-cores

It measures the memory bandwidth and the rate of matrix products of one and of two threads, and the time in which the
threads of the pool meet. It counts the jobs of a decode step, in models that have the layers of a shape with narrower
matrices, and times a step of an even narrower model: what is left then is the work of one thread. A step on C cores
takes

    max(bytes / min(C * bandwidth of a core, bandwidth of the nodes), operations / (C * rate of a core))
    + jobs * meeting time of C threads + time of one thread.

The bandwidth of a memory node is an assumption (NODE_BANDWIDTH), and so is the time of a meeting beyond two threads
(see `Machine.meeting`). The program writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from benchmarks.cpu.engine import RESULTS
from benchmarks.shapes import SHAPES, Format, active_parameters, median_seconds, weights_read, write_config
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.kernels.cpu.library import library, read_bandwidth
from jamba_server.kernels.cpu.linear import Linear, Packer
from jamba_server.llm import LLM
from jamba_server.server.cli.bench import conditions

# Twelve channels of DDR5-4800, of which a program reads four fifths.
NODE_BANDWIDTH: Final = 12 * 8 * 4.8e9 * 0.8
# A pool's group has this many threads, as in `kernels/cpu/src/pool.h`.
GROUP: Final = 16
# How much longer a cache line takes from a core of another group than from one that shares a cache.
FAR: Final = 3
STEPS, WARM_UP = 30, 8
NARROW: Final = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 8192}
NARROWEST: Final = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 1024}


@dataclass(frozen=True, slots=True)
class Core:
    """What one core does: bytes read and operations of matrix products in a second. `pair` are those of two cores.
    `meeting` is the time in seconds of a job without work with two threads, and `alone` with one."""

    bandwidth: float
    operations: float
    pair_bandwidth: float
    pair_operations: float
    alone: float
    meeting: float


class Step(NamedTuple):
    """A decode step: bytes of weights, operations, jobs that several threads share, and seconds of one thread."""

    bytes: float
    operations: float
    jobs: int
    serial: float


class Machine(NamedTuple):
    cores: int
    nodes: int

    def meeting(self, core: Core) -> float:
        """Returns the time until all threads have joined a job and left it, in seconds.

        With two threads, four transfers of a cache line follow each other: the job, the worker that joins, the worker
        that leaves, and the end. Each further worker of a group joins and leaves through the same cache line, one after
        the other. All groups do so at the same time, but the caller opens and closes each group.
        """
        transfer = core.meeting / 4
        groups = -(-self.cores // GROUP)
        return core.meeting + 2 * (min(self.cores, GROUP) - 2) * transfer + 2 * (groups - 1) * transfer * FAR

    def parts(self, core: Core, step: Step) -> dict[str, float]:
        """Returns the parts of a step's time in seconds, of which the first two overlap."""
        reading = step.bytes / min(self.cores * core.bandwidth, self.nodes * NODE_BANDWIDTH)
        return {
            "memory": reading,
            "operations": step.operations / (self.cores * core.operations),
            "meetings": step.jobs * self.meeting(core),
            "one thread": step.serial,
        }

    def seconds(self, core: Core, step: Step) -> float:
        parts = self.parts(core, step)
        return max(parts["memory"], parts["operations"]) + parts["meetings"] + parts["one thread"]


MACHINES: Final = (Machine(16, 1), Machine(64, 1), Machine(192, 2))


def measure_core() -> Core:
    """Measures this machine with one and with two threads."""
    native, linear = library(), Linear()
    memory = Packer().memory(conditions.uncached_size()).fill_(1)
    x, weight = torch.randn(512, 2560).bfloat16(), linear.pack(torch.randn(8192, 2560).bfloat16())
    found = list[tuple[float, float, float]]()
    for threads in (1, 2):
        native.set_threads(threads)
        rate = 2 * 512 * 2560 * 8192 / median_seconds(lambda: linear(x, weight), 1.0)
        found.append((read_bandwidth(native, memory, 1.0), rate, min(native.meeting_seconds() for _ in range(5))))
    (one, rate, alone), (two, pair_rate, meeting) = found
    return Core(one, rate, two, pair_rate, alone, meeting)


def decode(shape: dict[str, Any], sequences: int, threads: int) -> tuple[int, float]:
    """Returns the number of jobs in a decode step of a model with dummy weights, and the median time of a step."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(shape | {"torch_dtype": "bfloat16"}))
        llm = LLM(Path(name), load_format="dummy", max_model_len=256, max_num_seqs=64, threads=threads)
    params = SamplingParams(max_tokens=WARM_UP + STEPS + 4, temperature=0.0, ignore_eos=True)
    llm.core.inbox.submit([Request(id=str(i), prompt=[5, 6, 7 + i], params=params) for i in range(sequences)])
    for _ in range(WARM_UP):
        llm.core.step()
    before, taken = library().jobs_run(), list[float]()
    for _ in range(STEPS):
        start = time.perf_counter()
        llm.core.step()
        taken.append(time.perf_counter() - start)
    return (library().jobs_run() - before) // STEPS, statistics.median(taken)


def measure_step(shape: str, sequences: int) -> Step:
    """Computes the bytes and operations of a step of a shape, counts its jobs, and times the work of one thread."""
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        config = load_model_config(Path(name))
    heads = {"num_key_value_heads": 1} if SHAPES[shape]["num_key_value_heads"] == 1 else {"num_key_value_heads": 4}
    jobs, _ = decode(SHAPES[shape] | heads | NARROW | {"mamba_dt_rank": 64}, sequences, threads=2)
    _, serial = decode(SHAPES[shape] | heads | NARROWEST | {"mamba_dt_rank": 4}, sequences, threads=1)
    head = config.vocab_size * config.hidden_size
    return Step(
        bytes=weights_read(config, sequences, Format.parse("bf16")),
        operations=2 * sequences * (active_parameters(config) + head),
        jobs=jobs,
        serial=serial,
    )


def report(name: str, core: Core, steps: dict[tuple[str, int], Step]) -> str:
    """Returns the text of the result file."""
    lines = [
        f"# {name}",
        "",
        f"bfloat16, {conditions.describe_machine().cpu}, {conditions.utc_now()}. Measured:",
        "",
        "| | 1 thread | 2 threads |",
        "| --- | ---: | ---: |",
        f"| memory bandwidth, GB/s | {core.bandwidth / 1e9:.1f} | {core.pair_bandwidth / 1e9:.1f} |",
        f"| matrix products of 512 rows, GFLOP/s | {core.operations / 1e9:.0f} | {core.pair_operations / 1e9:.0f} |",
        f"| the threads meet in a job without work, ns | {1e9 * core.alone:.0f} | {1e9 * core.meeting:.0f} |",
        "",
        f"Predicted decoding, with {NODE_BANDWIDTH / 1e9:.0f} GB/s for each memory node (12 channels of DDR5-4800, of "
        "which a program reads four fifths). Each cell has tokens/s, and the largest part of a step with its share:",
        "",
        "| shape, sequences | jobs, one thread (ms) | "
        + " | ".join(f"{m.cores} cores, {m.nodes} node{'s' * (m.nodes > 1)}" for m in MACHINES)
        + " |",
        "| --- | ---: " + "| ---: " * len(MACHINES) + "|",
    ]
    for (shape, sequences), step in steps.items():
        cells = list[str]()
        for machine in MACHINES:
            seconds, parts = machine.seconds(core, step), machine.parts(core, step)
            limit = max(parts, key=lambda part: parts[part])
            cells.append(f"{sequences / seconds:,.0f} ({limit} {parts[limit] / seconds:.0%})")
        lines.append(f"| {shape}, {sequences} | {step.jobs}, {1e3 * step.serial:.1f} | {' | '.join(cells)} |")
    meetings = ", ".join(f"{1e6 * machine.meeting(core):.1f} us at {machine.cores} cores" for machine in MACHINES)
    return "\n".join([*lines, "", f"A meeting of all threads is predicted to take {meetings}.", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--shapes", default="3b,mini", help="model shapes, separated by commas")
    parser.add_argument("--sequences", default="1,8,32", help="numbers of sequences that decode at the same time")
    options = parser.parse_args(arguments)
    core = measure_core()
    steps = {
        (shape, int(count)): measure_step(shape, int(count))
        for shape in options.shapes.split(",")
        for count in options.sequences.split(",")
    }
    text = report(options.name, core, steps)
    print(text)
    (RESULTS / f"{options.name}.md").write_text(text)


if __name__ == "__main__":
    main()
