"""A part of `check`: what it is told, and its results, in a file that is whole after every cell."""

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

ERROR_TAIL = 1500  # characters
PACKAGES = ("torch", "triton", "transformers", "mamba-ssm", "causal-conv1d", "pytest")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one process measures: a part, for the parts with a model its shape and format (as `shapes.Format` has it),
    and what else the engine is told. `cold`: with nothing compiled, and nothing but the first reply."""

    part: str
    path: str
    device: str
    shape: str = ""
    format: str = "bf16"
    options: dict[str, Any] = {}
    cold: bool = False
    commit: str = ""

    @property
    def variant(self) -> str:
        """Of the engine: what it was told beside shape and format."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in sorted(self.options.items()))

    def key(self, *names: object) -> str:
        """Of a cell of this job."""
        return ", ".join(filter(None, [self.shape, self.format if self.shape else "", self.variant, *map(str, names)]))


class Record:
    """The cells of a part by key, measured or failed, and the runs that they were measured in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = known.get("rows", {})
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        self.running: str | None = known.get("running")

    def write(self) -> None:
        """Whoever is killed leaves the old file or the new one."""
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"runs": self.runs, "rows": self.rows, "running": self.running}, indent=1) + "\n")
        os.replace(beside, self.path)

    def start_run(self, job: Job, **more: Any) -> None:
        self.runs.append(conditions(job) | more)
        self.write()

    def note(self, **more: Any) -> None:
        """Of the run that goes on."""
        self.runs[-1] |= more
        self.write()

    def cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Measures a cell that is not known yet. One that fails is written down and the next one comes, unless the
        device is lost. Returns what was measured."""
        if key in self.rows:
            return None if "error" in self.rows[key] else self.rows[key]
        self.running = key
        self.write()
        start = time.perf_counter()
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001 - whatever fails, the cells after it are wanted
            row = {"error": "".join(traceback.format_exception(error))[-ERROR_TAIL:]}
        self.finish(key, row | {"run": len(self.runs) - 1, "wall_seconds": time.perf_counter() - start})
        print(f"{self.path.stem}: {key}: {summary(row)}", flush=True)
        if "error" in row and torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the device is lost; another process goes on then
            torch.cuda.empty_cache()
        return None if "error" in row else row

    def finish(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key], self.running = row, None
        self.write()

    def forget_errors(self) -> None:
        """What failed is tried again."""
        self.rows = {key: row for key, row in self.rows.items() if "error" not in row}
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
    """None where git or the driver's command is missing or fails: no reason to measure nothing."""
    try:
        return describe()
    except (OSError, subprocess.SubprocessError):
        return None


def conditions(job: Job) -> dict[str, Any]:
    """Of a run: machine, versions, what was asked for."""
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
        "job": {key: value for key, value in msgspec.to_builtins(job).items() if key not in ("path", "commit")},
    }
