"""Defines the jobs and the result files of the GPU check. A result file is written after every measurement.

A cell is a single measurement with a key.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from benchmarks.http.serving import describe_commit, describe_gpu
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

ERROR_TAIL = 1500  # number of characters that are kept from the end of a traceback
PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d", "pytest")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The task of one process of the GPU check: a part of the check, with the model shape and the weight format to use.

    `format` is written as in `shapes.Format`. `options` are further fields of EngineConfig. A `cold` job starts without
    compiled kernels and measures only the first reply. `cells` is a regular expression that chooses what the part
    `tune` times; "" stands for the part's own choice.
    """

    part: str
    path: str
    device: str
    shape: str = ""
    format: str = "bf16"
    options: dict[str, Any] = {}
    cold: bool = False
    commit: str = ""
    cells: str = ""

    @property
    def variant(self) -> str:
        """The engine options of this job as text such as "block_size=32", or "" if the job has no engine options."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(self.options.items()))

    def key(self, *names: object) -> str:
        """Returns the key of a measurement: model shape, weight format, engine options and the strings `names`, joined
        by commas."""
        return ", ".join(filter(None, [self.shape, self.format if self.shape else "", self.variant, *map(str, names)]))


class Record:
    """The result file of one part of the GPU check. The file contains the result or the error message of each
    measurement under the measurement's key. The file also contains the conditions of each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = known.get("rows", {})
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        self.running: str | None = known.get("running")

    def write(self) -> None:
        """Replaces the result file atomically. If the process is killed during the write, the old result file is still
        there."""
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"runs": self.runs, "rows": self.rows, "running": self.running}, indent=1) + "\n")
        os.replace(beside, self.path)

    def start_run(self, job: Job, **more: Any) -> None:
        self.runs.append(conditions(job) | more)
        self.write()

    def note(self, **more: Any) -> None:
        """Adds the fields `more` to the conditions of the current run, and writes the result file."""
        self.runs[-1] |= more
        self.write()

    def cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Calls the function `measure` unless the result file already has a row for the key `key`. Returns the row, or
        None if the measurement failed.

        A failure is recorded in the file, and this function returns, so that the next measurements can follow. If the
        failure has made the GPU unusable, this function raises an error.
        """
        if key in self.rows:
            return None if "error" in self.rows[key] else self.rows[key]
        self.running = key
        self.write()
        start = time.perf_counter()
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001 - whatever fails, the next cells are still to be measured
            row = {"error": "".join(traceback.format_exception(error))[-ERROR_TAIL:]}
        self.finish(key, row | {"run": len(self.runs) - 1, "wall_seconds": time.perf_counter() - start})
        print(f"{self.path.stem}: {key}: {summary(row)}", flush=True)
        if "error" in row and torch.cuda.is_available():
            # this call raises an error if the GPU is unusable; a new process then makes the next measurements
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return None if "error" in row else row

    def finish(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key], self.running = row, None
        self.write()

    def forget_errors(self) -> None:
        """Removes failed measurements and failed checks from the result file, so that the next run repeats them."""
        self.rows = {k: row for k, row in self.rows.items() if "error" not in row and row.get("passed") is not False}
        self.running = None
        self.write()


def summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED: {row['error'].strip().splitlines()[-1]}"
    shown = {key: value for key, value in row.items() if isinstance(value, int | float | str)}
    return ", ".join(
        f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _said(describe: Callable[[], str | None]) -> str | None:
    """Returns the result of the function `describe`, which starts another program. Returns None if this program is
    missing or fails."""
    try:
        return describe()
    except (OSError, subprocess.SubprocessError):
        return None


def conditions(job: Job) -> dict[str, Any]:
    """Returns the conditions of a run: date, commit, GPU, machine, versions of packages, and the job."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions |= describe_versions([package])
        except ModuleNotFoundError:
            versions[package] = "not installed"
    cuda = cast(Any, torch.version).cuda
    return {
        "date": utc_now(),
        "commit": job.commit or _said(describe_commit),
        "gpu": _said(describe_gpu),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": versions | {"cuda": cuda},
        "job": {
            key: value for key, value in msgspec.to_builtins(job).items() if key not in ("path", "commit", "cells")
        },
    }
