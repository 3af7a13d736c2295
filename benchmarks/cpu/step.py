"""Measures how the time of a decode step on this CPU divides among compiled kernels and the Python code around them.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu.step --name cpu-step [--shape small] [--clients 1,8,32]

The table has medians over the steps, in microseconds per step. The clocks add about 0.3 us to each call, which appears
in the rows of Python. The parts are measured in steps without recorded graphs; the last line is a whole step with them.
The program writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.cpu.engine import RESULTS
from benchmarks.shapes import SHAPES
from jamba_server.engine import model_runner
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.kernels.cpu.library import Library
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, utc_now

STEPS, WARM_UP = 30, 8


class Clock:
    """Counts the calls of each watched function during one decode step, and sums their times in nanoseconds."""

    def __init__(self) -> None:
        self.spent, self.calls = Counter[str](), Counter[str]()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*arguments, **named)
            self.spent[name] += time.perf_counter_ns() - start
            self.calls[name] += 1
            return result

        return run

    def watch(self, owner: object, name: str) -> None:
        setattr(owner, name, self.timed(name, getattr(owner, name)))

    def watch_library(self) -> None:
        """Replaces the method `Library.function`, so that all compiled kernels that it returns are timed."""
        find = Library.function

        def function(library: Library, name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
            return self.timed(f"kernel {name}", find(library, name, *arguments, result=result))

        setattr(Library, "function", function)  # noqa: B010 (the type checker refuses assignment to a method)


def measure(llm: LLM, clock: Clock, clients: int) -> tuple[dict[str, float], Counter[str]]:
    """Runs decode steps with `clients` concurrent sequences and times them.

    Returns {name: median time in a step, in nanoseconds} and {name: number of calls in the last step}. The name "step"
    has the time of the whole step.
    """
    random = Random(0)
    params = SamplingParams(max_tokens=WARM_UP + STEPS + 4, temperature=0.0, ignore_eos=True)
    prompts = [[random.randrange(3, 30_000) for _ in range(4)] for _ in range(clients)]
    llm.core.inbox.submit([Request(id=f"{clients}-{i}", prompt=p, params=params) for i, p in enumerate(prompts)])
    for _ in range(WARM_UP):
        llm.core.step()
    steps: list[Counter[str]] = []
    for _ in range(STEPS):
        clock.spent, clock.calls = Counter(), Counter()
        clock.timed("step", llm.core.step)()
        steps.append(clock.spent)
    calls = clock.calls.copy()
    while llm.core.has_work:
        llm.core.step()
    return {name: statistics.median(step[name] for step in steps) for name in steps[-1]}, calls


def rows(spent: dict[str, float]) -> dict[str, float]:
    """Divides the time of a step into the times of the kernels and the times of the parts of the Python code.

    The returned times add up to the time of the whole step.
    """
    kernels = {name: ns for name, ns in spent.items() if name.startswith("kernel ")}
    in_sampler = spent["kernel sample"]
    phases = ("schedule", "build_batch", "forward", "logits", "launch", "advance", "update")
    return kernels | {
        "Python: the layers": spent["forward"] + spent["logits"] - sum(kernels.values()) + in_sampler,
        "Python: sampler": spent["launch"] - in_sampler,
        "Python: batch": spent["build_batch"],
        "Python: scheduler": spent["schedule"] + spent["advance"] + spent["update"],
        "Python: the rest": spent["step"] - sum(spent[phase] for phase in phases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="model shape")
    parser.add_argument("--clients", default="1,8,32", help="numbers of sequences that decode at the same time")
    arguments = parser.parse_args()
    clock = Clock()
    clock.watch_library()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPES[arguments.shape] | {"torch_dtype": "bfloat16"}))
        llm = LLM(folder, load_format="dummy", max_model_len=1024, max_num_seqs=64)
    runner, scheduler = llm.core.model_runner, llm.core.scheduler
    for owner, method in (
        *(
            (scheduler, "schedule"),
            (scheduler, "advance"),
            (scheduler, "update"),
            (model_runner, "build_batch"),
        ),
        *((runner.model, "forward"), (runner.model, "logits"), (runner.sampler, "launch")),
    ):
        clock.watch(owner, method)
    gc.collect()
    gc.freeze()
    clients = [int(count) for count in arguments.clients.split(",")]
    graphs, runner.graphs = runner.graphs, None
    measured = [measure(llm, clock, count) for count in clients]
    runner.graphs = graphs
    replayed = [measure(llm, clock, count)[0]["step"] for count in clients]
    tables, wholes = [rows(spent) for spent, _ in measured], [spent["step"] for spent, _ in measured]
    names = sorted(tables[0], key=lambda name: -tables[0][name])
    lines = [f"| {arguments.shape}, us a step | calls | " + " | ".join(f"{n} sequences" for n in clients) + " |"]
    lines.append("| --- " * (len(clients) + 2) + "|")
    for name in names:
        cells = [f"{t[name] / 1e3:,.0f} ({t[name] / whole:.0%})" for t, whole in zip(tables, wholes, strict=True)]
        lines.append(f"| {name} | {measured[0][1][name] or ''} | {' | '.join(cells)} |")
    for name, totals in (("the step", wholes), ("the step, with graphs", replayed)):
        lines.append(f"| {name} | | " + " | ".join(f"{total / 1e3:,.0f}" for total in totals) + " |")
    text = (
        f"# {arguments.name}\n\nbfloat16, {torch.get_num_threads()} threads, {describe_machine().cpu}, {utc_now()}.\n\n"
    )
    text += "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
