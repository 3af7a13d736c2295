"""Tests this project and measures its speed on a machine with a GPU, in one command and without a network.

    python -m benchmarks.gpu.check --name h200 --call first   (then second, third)
    python -m benchmarks.gpu.check --name h200 --only kernels,sweep
    python -m benchmarks.gpu.check --name h200 --report

The parts are:

* probe: says what is missing on the machine, and compares the bits of products in different tiles;
* parity: compares this engine with transformers on the same GPU, on tiny checkpoints;
* 3b, mini: measures decode, prefill, the first reply and a context of 256K tokens with dummy weights, first with the
  fastest kernels and then with exact ones;
* kernels: runs the kernel tests on the GPU, in all dtypes;
* http: measures a server under the load of `jamba bench`;
* dependent: measures decode where a kernel may be launched before the one before it has ended, as `3b` does without;
* counters: reads the hardware counters of five kernel calls;
* tune: times other tile sizes for the kernels that take most of a step's time;
* sanitizer: runs tests of the Mamba and expert kernels under compute-sanitizer;
* sweep: compares every kernel with the reference in float32 at the shapes of the 3B and Mini models, and times it;
* transformers: measures transformers' `generate` at the same shapes.

A part consists of cells, which are single measurements. Every part runs in processes of its own and writes its results
to OUT/NAME-parts/PART.json after every cell, so nothing is lost when the time is over. A cell that has a result there,
or in the folder --earlier, is not measured again unless it failed. A part that has used up its own time (LIMITS) makes
room for the next one, and the same command continues it. `--report` writes OUT/NAME.json and OUT/NAME.md from all
parts. All data is random, so nothing is timed on zeros.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import torch

from benchmarks.gpu.record import Job, Record
from benchmarks.gpu.report import failures, markdown, read_parts
from benchmarks.shapes import SHAPES, Format
from jamba_server.engine.config import EngineConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = {
    "probe": "probe",
    "parity": "parity",
    "3b": "engine",
    "kernels": "tests",
    "mini": "engine",
    "http": "serving",
    "dependent": "engine",
    "counters": "counters",
    "tune": "tune",
    "sanitizer": "tests",
    "sweep": "sweep",
    "transformers": "peer_transformers",
}
# The parts of each call on a rented machine, which takes ten minutes. The first call shows that the engine works and
# gives its first figures. The second measures the large model and the server, the third tunes the kernels, and "rest"
# runs what is left.
CALLS: Mapping[str, Sequence[str]] = {
    "first": ("probe", "parity", "3b", "kernels"),
    "second": ("mini", "http", "counters"),
    "third": ("dependent", "tune", "sanitizer"),
    "rest": ("kernels", "mini", "sweep", "transformers"),
}
# Seconds after which a part makes room for the next one. Parts that are not named have no limit of their own.
LIMITS: Mapping[str, float] = {
    "probe": 75,
    "parity": 110,
    "3b": 230,
    "mini": 290,
    "http": 120,
    "dependent": 80,
    "counters": 90,
    "tune": 280,
}
# The model shapes and weight formats that each part of the GPU check uses if the options --shape and --formats are not
# given.
DEFAULT_SHAPES: Mapping[str, Sequence[str]] = {
    "3b": ("3b",),
    "dependent": ("3b",),
    "mini": ("mini",),
    "http": ("3b",),
    "transformers": ("3b", "mini"),
    "sweep": ("3b", "mini"),
    "tune": ("3b", "mini"),
}
# The exactness of the kernels that these parts measure, in this order, unless --engine sets it.
EXACTNESS: Mapping[str, Sequence[bool]] = {
    "3b": (False, True),
    "mini": (False, True),
    "dependent": (True,),
    "http": (False,),
}
# Parts whose measurements do not depend on the engine's options.
WITHOUT_OPTIONS = ("probe", "kernels", "sanitizer", "counters", "transformers", "sweep", "tune")
DEFAULT_FORMATS: Mapping[str, Sequence[str]] = {
    "3b": ("bf16",),
    "dependent": ("bf16",),
    "mini": ("int8", "bf16"),
    "http": ("bf16",),
}
MINUTES = 8.5
GRACE_SECONDS = 25.0  # seconds that a process may take to end after SIGTERM; a process that takes longer gets SIGKILL
# if fewer seconds than this are left, no new process is started, because no measurement could be completed in this time
LEAST_SECONDS = 15.0
# Largest number of seconds that the start of a process, or one measurement in the process, may take. A process that
# takes longer is stopped.
CELL_SECONDS = 240.0
POLL_SECONDS = 2.0
# After a job, the check waits until the GPU's used memory is at most FREE_SLACK MiB larger than before the job. The
# check waits at most FREE_SECONDS seconds.
FREE_SECONDS, FREE_SLACK = 20.0, 256
ERROR_TAIL = 1500  # number of characters that are kept from the end of a process's stderr output
# Name of an environment variable that the check sets for each job. All processes that a job starts inherit the
# variable, so the check can find these processes.
MARK = "GPU_CHECK_PROCESS"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of the result files, without extension")
    parser.add_argument("--only", help="parts to run, in this order (default: all)")
    parser.add_argument("--call", choices=sorted(CALLS), help="run the parts of one call on a rented machine")
    parser.add_argument("--cells", default="", help="regular expression: which calls the part tune times (. for all)")
    parser.add_argument("--report", action="store_true", help="measure nothing, but write the table and its JSON")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="KEY=VALUE", help="field of EngineConfig to set (repeatable)"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="model shape to use instead of the parts' own")
    parser.add_argument("--formats", help="weight formats to use instead of the parts' own, such as bf16,int8")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device to measure")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time after which all processes are stopped")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", RESULTS)),
        help="folder for the results (default: $OUT, else benchmarks/results)",
    )
    parser.add_argument("--earlier", type=Path, default=RESULTS, help="folder with the results of earlier runs")
    parser.add_argument("--commit", default="", help="commit to record if git is not available")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if not (parsed.name or parsed.child):
        parser.error("--name is required")
    if parsed.only and parsed.call:
        parser.error("--only and --call exclude each other")
    parsed.only = parsed.only or ",".join(CALLS[parsed.call] if parsed.call else MODULES)
    if unknown := [part for part in parsed.only.split(",") if part not in MODULES]:
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(MODULES)}")
    return parsed


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Converts strings of the form KEY=VALUE to a dictionary of fields of the class `EngineConfig`.

    A value that is valid JSON is decoded; any other value is a string. A field that EngineConfig does not have is
    refused, so that no result is recorded under an option without effect.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.replace("-", "_")
        if not equals or key in ("quantization", "quantize_mamba", "device", "dtype", "load_format"):
            raise SystemExit(f"--engine {pair}: KEY=VALUE is expected; --formats and --device have flags of their own.")
        if key not in EngineConfig.__struct_fields__:
            raise SystemExit(f"--engine {pair}: engine.config.EngineConfig has no such field.")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def make_jobs(part: str, arguments: argparse.Namespace, path: Path) -> list[Job]:
    """Returns the jobs of one part of the GPU check. There is one job for each combination of model shape and weight
    format."""
    base = Job(part=part, path=str(path), device=arguments.device, commit=arguments.commit)
    shapes = DEFAULT_SHAPES.get(part, ())
    if shapes and arguments.shape:
        shapes = (arguments.shape,)
    formats: Sequence[str] = DEFAULT_FORMATS.get(part, ("bf16",))
    if arguments.formats and part in DEFAULT_FORMATS:
        formats = [Format.parse(name).name for name in arguments.formats.split(",")]
    options = {} if part in WITHOUT_OPTIONS else parse_options(arguments.engine)
    base = msgspec.structs.replace(base, options=options, cells=arguments.cells)
    if not shapes:
        return [base]
    exactness = [{"batch_invariant": exact} for exact in EXACTNESS.get(part, ())]
    if not exactness or "batch_invariant" in options:
        exactness = [{}]
    jobs = [
        msgspec.structs.replace(base, shape=shape, format=name, options=options | exact)
        for shape in shapes
        for name in formats
        for exact in exactness
    ]
    # In the part `3b`, the first job begins with an empty kernel cache. This job measures the seconds until the first
    # reply.
    return [msgspec.structs.replace(jobs[0], cold=True), *jobs] if part == "3b" else jobs


def run_job(job: Job) -> None:
    """Runs a job of the GPU check in the current process, which was started for this job alone."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(f"stopped by signal {number}")

    # SIGTERM raises the exception SystemExit, so that the job can stop its own child processes before the job ends
    signal.signal(signal.SIGTERM, stop)
    importlib.import_module(f"benchmarks.gpu.{MODULES[job.part]}").run(job, Record(Path(job.path)))


def supervise(job: Job, deadline: float, environment: Mapping[str, str]) -> None:
    """Runs a job of the GPU check in a new process. If this process dies before the job has ended, another process
    continues the job. No process runs after the time `deadline`.

    A cell is one measurement. If the job's process dies in a cell, or is stopped because a cell takes too long, the
    cell is recorded as failed. A new process then continues with the next cell.
    """
    path = Path(job.path)
    name = " ".join(filter(None, [job.part, job.shape, job.format if job.shape else "", job.variant]))
    while (left := deadline - time.monotonic()) > LEAST_SECONDS:
        print(f"== {name}: {left:.0f} s left", flush=True)
        known = len(Record(path).rows)
        status, tail = run_process(job, deadline, environment)
        record = Record(path)
        if status == 0:
            return
        if status is None:
            record.running = None  # a measurement that was interrupted because time ran out is not recorded as failed
            record.write()
            if record.runs:
                record.note(stopped=f"time was up after {len(record.rows)} cells")
            return
        said = f"the process ended with status {status}: {tail}"
        print(f"== {name}: {said}", flush=True)
        if record.running is not None:
            record.finish(record.running, {"error": said})
        # the process failed before its first measurement; a new process would fail at the same place, so none is
        # started
        elif len(record.rows) == known:
            record.finish(job.key("start"), {"error": said})
            return
    print(f"== {name}: no time is left", flush=True)


def run_process(job: Job, deadline: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Runs a job in a new process. Returns the process's exit status (None if time ran out) and the end of the
    process's stderr output.

    When this returns, all processes that the job has started are killed. It waits until their GPU memory is free.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--child", msgspec.json.encode(job).decode()]
    mark, before = f"{MARK}={uuid4().hex}", gpu_memory_used()
    marked = {**environment, MARK: mark.partition("=")[2]}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=marked, stderr=errors, start_new_session=True)
        status, why = watch(process, Path(job.path), deadline)
        kill_marked(mark)
        errors.seek(0)
        tail = errors.read()[-ERROR_TAIL:].strip()
    give_up = time.monotonic() + FREE_SECONDS
    while before is not None and (used := gpu_memory_used()) is not None and used > before + FREE_SLACK:
        if time.monotonic() > give_up:
            print(f"== {used - before} MiB of the GPU's memory are still taken after a process has ended", flush=True)
            break
        time.sleep(0.5)
    return status, f"{why}{tail}"


def watch(process: subprocess.Popen[Any], path: Path, deadline: float) -> tuple[int | None, str]:
    """Waits for a process to end. Returns the process's exit status and a message. The message is empty unless the
    process was stopped for being slow.

    The process is stopped when `deadline` has passed; the status is then None. The process writes to `path` after every
    cell (measurement). It is also stopped if it has not written to `path` for CELL_SECONDS seconds.
    """
    changed, seen = time.monotonic(), -1.0
    while time.monotonic() < deadline:
        try:
            return process.wait(min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))), ""
        except subprocess.TimeoutExpired:
            pass
        if (modified := path.stat().st_mtime if path.is_file() else 0.0) != seen:
            changed, seen = time.monotonic(), modified
        elif time.monotonic() - changed > CELL_SECONDS:
            stop(process)
            return -signal.SIGKILL, f"stopped, because it finished no cell for {CELL_SECONDS:.0f} s. "
    stop(process)
    return None, ""


def stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_marked(mark: str) -> None:
    """Kills all processes that have the string `mark` in their environment, in all process groups and sessions.

    A server whose parent was killed would otherwise keep the GPU's memory.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # the process has ended, or the current user is not allowed to read the process's environment


def gpu_memory_used() -> int | None:
    """Returns the used memory of the first GPU in MiB, or None if nvidia-smi does not report it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return int(said.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def environment_of(folder: str, job: Job) -> dict[str, str]:
    """Returns the environment variables for the process that runs a job.

    If `job.cold` is true, `folder`, which must be empty, is the cache of compiled kernels.
    """
    known = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if job.cold:
        known["TRITON_CACHE_DIR"] = folder
    elif "TRITON_CACHE_DIR" not in known and not os.access(Path.home(), os.W_OK):
        known["TRITON_CACHE_DIR"] = str(
            Path(tempfile.gettempdir()) / "triton-cache"
        )  # a fixed folder for compiled kernels, so that later runs of the check reuse the compiled kernels
    if job.part == "tune" and job.device == "cpu":
        known["TRITON_INTERPRET"] = "1"  # on a CPU, Triton interprets kernels instead of compiling them
    return known


def start_of(path: Path, earlier: Path) -> None:
    """Prepares the result file `path`. If `path` does not exist, the result file `earlier` of an earlier run is copied
    to `path`. Failed measurements are removed from `path`, so that the check repeats these measurements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() and earlier.is_file():
        path.write_bytes(earlier.read_bytes())
    if path.is_file():
        Record(path).forget_errors()


def measure(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * arguments.minutes
    for part in arguments.only.split(","):
        deadline = min(end, time.monotonic() + LIMITS.get(part, float("inf")))
        path = arguments.out.resolve() / f"{arguments.name}-parts" / f"{part}.json"
        start_of(path, arguments.earlier / f"{arguments.name}-parts" / f"{part}.json")
        jobs = make_jobs(part, arguments, path)
        with tempfile.TemporaryDirectory() as folder:
            environment = environment_of(folder, jobs[0])
            for job in jobs:
                supervise(job, deadline, environment)


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        run_job(msgspec.json.decode(arguments.child, type=Job))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"No GPU: torch {torch.__version__} sees no NVIDIA GPU. (--device cpu tries the command.)")
        measure(arguments)
    parts = read_parts(arguments.name, [arguments.out, arguments.earlier])
    if arguments.report:
        (arguments.out / f"{arguments.name}.json").write_text(json.dumps(parts, indent=1) + "\n")
        (arguments.out / f"{arguments.name}.md").write_text(markdown(arguments.name, parts, sweep=True))
    print(markdown(arguments.name, parts, sweep=False))
    if failures(parts):
        raise SystemExit("Something failed: see above.")


if __name__ == "__main__":
    main()
