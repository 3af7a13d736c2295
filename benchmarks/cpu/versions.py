"""Compares the speed of this checkout with that of another one, for example of an earlier commit, in one run.

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python -m benchmarks.cpu.versions --name NAME --before ../before [--shapes small,moe,3b] [--formats bf16,int8,int4]
        [--sequences 1,8,16] [--rounds 9] [--step 512] [--level avx2]

Both engines are loaded at the same time, each in a process of its own, and take turns. Printed are the median times of
both, and the median over the rounds of the ratio "time before / time now", from which slow changes of the machine's
speed drop out. So a ratio above 1 means that this checkout is faster. The weights are dummies and decoding is greedy.
The time of a decode step is measured as in `engine.py`. Without --step each version has its own default number of
prompt tokens in a step. The program writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks.cpu.engine import PREFILL_TOKENS, RESULTS
from benchmarks.http.serving import describe_commit
from benchmarks.shapes import SHAPES, Format, write_config
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

ROOT = Path(__file__).parents[2]
TOKENS_IN, TOKENS_OUT = 128, 64  # of a whole request
STEPS = {1: 24, 8: 16, 16: 8}  # decode steps of a measurement, by the number of sequences


class Version:
    """An engine of the code in the folder `checkout`, in a process of its own."""

    def __init__(self, checkout: Path, job: dict[str, Any]) -> None:
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(checkout / "src")}
        command = [sys.executable, str(Path(__file__).with_name("versions_worker.py"))]
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, cwd=checkout, **pipe)
        self.tokens_in_a_step: int = self._ask(job)["tokens_in_a_step"]

    def _ask(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"The engine ended with the status {self._process.wait()}; its message is above.")
        return json.loads(line)

    def seconds(self, count: int, length: int, tokens: int) -> float:
        return self._ask({"count": count, "length": length, "tokens": tokens})

    def prefill(self) -> float:
        return self.seconds(1, PREFILL_TOKENS, 1)

    def decode(self, count: int) -> float:
        """Returns the seconds of a decode step of `count` sequences."""
        steps = STEPS.get(count, 16)
        return (self.seconds(count, 4, steps + 1) - self.seconds(count, 4, 1)) / steps

    def requests(self, count: int) -> float:
        """Returns the seconds of `count` requests that come at once."""
        return self.seconds(count, TOKENS_IN, TOKENS_OUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def compare(before: Version, now: Version, sequences: list[int], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Returns {case: (median seconds before, median seconds now, median ratio)}."""
    cases: dict[str, Callable[[Version], float]] = {f"prefill of {PREFILL_TOKENS}": Version.prefill}
    cases |= {f"decode, {count}": lambda version, count=count: version.decode(count) for count in sequences}
    cases |= {
        f"{count} x {TOKENS_IN} in, {TOKENS_OUT} out": lambda version, count=count: version.requests(count)
        for count in sequences
    }
    for case in (*cases.values(), *cases.values()):  # twice, because steps with prompts are recorded the second time
        case(before)
        case(now)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, case in cases.items():
            if turn % 2:
                later = case(now)
                found[name].append((case(before), later))
            else:
                found[name].append((case(before), case(now)))
    return {
        name: (
            statistics.median(old for old, _ in pairs),
            statistics.median(new for _, new in pairs),
            statistics.median(old / new for old, new in pairs),
        )
        for name, pairs in found.items()
    }


def measure(shape: str, stored: Format, arguments: argparse.Namespace) -> list[str]:
    """Returns the rows of the table for a model shape and a format."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        job: dict[str, Any] = {"folder": folder, "vocabulary": SHAPES[shape]["vocab_size"], **stored.settings}
        job |= {"threads": arguments.threads, "max_model_len": 1024, "max_num_seqs": max(arguments.sequences)}
        job |= {"max_num_batched_tokens": arguments.step} if arguments.step else {}
        job |= {"kernels": {"linear": f"cpu:{arguments.level}"}} if arguments.level else {}
        with Version(arguments.before, job) as before, Version(ROOT, job) as now:
            found = compare(before, now, arguments.sequences, arguments.rounds)
            sizes = f"{before.tokens_in_a_step}, {now.tokens_in_a_step}"
    lines = [
        f"| {shape} | {stored.name} | {name} | {old * 1e3:,.2f} | {new * 1e3:,.2f} | {ratio:.2f} | {sizes} |"
        for name, (old, new, ratio) in found.items()
    ]
    print("\n".join(lines), flush=True)
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--before", required=True, type=Path, help="folder of the other checkout, built in place")
    parser.add_argument("--shapes", default="small,moe,3b", help="model shapes to measure")
    parser.add_argument("--formats", default="bf16,int8,int4", help="weight formats to measure")
    parser.add_argument("--sequences", default="1,8,16", help="numbers of sequences that decode at the same time")
    parser.add_argument("--rounds", type=int, default=9, help="how often each case is measured")
    parser.add_argument("--step", type=int, help="prompt tokens in a step, in both versions")
    parser.add_argument("--level", help="instruction set of the matrix products, in both versions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each engine")
    arguments = parser.parse_args()
    arguments.before = arguments.before.resolve()
    arguments.sequences = [int(count) for count in arguments.sequences.split(",")]
    if unknown := [shape for shape in arguments.shapes.split(",") if shape not in SHAPES]:
        parser.error(f"Unknown shapes {', '.join(unknown)}; the known ones are {', '.join(SHAPES)}.")
    return arguments


def commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    arguments = parse_arguments()
    path = RESULTS / f"{arguments.name}.md"
    lines = [
        f"# {arguments.name}",
        "",
        f"{describe_machine().cpu}, {arguments.threads} threads, {describe_versions(('torch',))}, {utc_now()}. Before: "
        f"commit {commit_of(arguments.before)}; now: commit {describe_commit()}. Medians of {arguments.rounds} rounds.",
        "",
        "| shape | format | case | before, ms | now, ms | before / now | tokens in a step, before and now |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for shape in arguments.shapes.split(","):
        for stored in arguments.formats.split(","):
            lines += measure(shape, Format.parse(stored), arguments)
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
