"""Writes the results of a load test: a JSON file, and a Markdown page with a table and a list of the requirements that
were met or not."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarks.http.serving import RESULTS, announcement, describe_commit, running_server
from benchmarks.http.shapes import write_tokenizer
from benchmarks.shapes import SHAPES, write_config
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one requirement of a benchmark: the requirement, what was measured, and whether the measurement
    meets the requirement."""

    required: str
    measured: str
    met: bool


@contextmanager
def model_of(shape: str) -> Generator[list[str]]:
    """Context manager: yields the arguments with which `jamba serve` serves a model of the size `shape` with random
    weights. The shape `demo` stands for the demonstration checkpoint."""
    if shape == "demo":
        yield []
        return
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        write_tokenizer(SHAPES[shape]["vocab_size"], Path(name))
        yield [name, "--load-format", "dummy"]


def measure_server(
    shape: str, arguments: Sequence[str], measure: Callable[[str], T], *, timeout: float, prefix: Sequence[str] = ()
) -> tuple[T, dict[str, Any]]:
    """Starts a server for a model of the size `shape`, and calls `measure` with the server's URL. Returns the result of
    this call and the conditions of the measurement. `arguments`, `timeout` and `prefix` are described at
    `running_server`."""
    with model_of(shape) as model, running_server([*model, *arguments], timeout, prefix) as (url, log):
        found = measure(url)
        return found, conditions(announcement(log), sys.argv[1:])


def conditions(server: list[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the conditions of a measurement, such as the machine and the versions of libraries. `server` has the
    lines that the server logged at its start."""
    return {
        "date": utc_now(),
        "commit": describe_commit(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(("torch", "fastapi", "uvicorn", "tokenizers")),
        "arguments": list(arguments),
        "server": server,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def write_results(
    name: str, title: str, found: dict[str, Any], content: dict[str, Any], body: str, verdicts: Sequence[Verdict]
) -> None:
    """Writes results/NAME.json and results/NAME.md, prints the page, and exits with status 1 if a verdict is not met.

    `found` are the conditions, `content` is the JSON of the measurements, and `body` is the page's Markdown.
    """
    machine = "{cpu}, {cores} cores, {memory_gib} GiB".format(**found["machine"])
    judged = table(
        ("required", "measured", "met"), [(v.required, v.measured, "yes" if v.met else "**no**") for v in verdicts]
    )
    started = "\n".join(found["server"])
    page = f"# {name}\n\n{title}\n\n{found['date']}, commit {found['commit']}; {machine}. Client and server share the "
    page += f"machine.\nCommand line of the program: `{' '.join(found['arguments'])}`.\n\n{judged}\n{body}\n"
    page += f"```\n{started}\n```\n"
    RESULTS.mkdir(exist_ok=True)
    report = {"conditions": found, "verdicts": [msgspec.to_builtins(v) for v in verdicts], **content}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
    sys.stdout.write(page)
    if not all(verdict.met for verdict in verdicts):
        sys.exit("At least one requirement is not met: see the table.")
