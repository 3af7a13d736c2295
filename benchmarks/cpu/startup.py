"""Measures how long the engine takes to start from files on a disk, and how much memory it takes.

    python -m benchmarks.cpu.startup --name startup --folder FOLDER [--shape 3b] [--threads 2]

A checkpoint with random weights is written to FOLDER in bfloat16 and converted to each format, one after the other. All
files are removed at the end, unless --keep is given. For each case, the pages of the files are dropped from the
system's page cache and the files are read once, which gives the disk's read rate. After the pages have been dropped
again, a new process loads the engine. Its time runs from the start of the process, so it includes the imports, until
the engine can take requests.

The time that the disk needs is the size of the files divided by the read rate of the same case. The time of the
imports, which no faster disk shortens, is given beside it. Memory is that of the process: what loading adds to its own
memory, without the pages of mapped files, at the end and at most, which is sampled every 10 ms. Caches take memory only
as far as they were used. The planned weights are those that the engine reports.

The same start is measured of `jamba serve`, until it is ready for requests. Its engine begins to read the files before
its imports.

The option --tree measures another tree of this repository in the same run, before this tree in each case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.http.serving import RESULTS, describe_commit, running_server
from benchmarks.shapes import SHAPES
from jamba_server.engine.convert.metadata import FILE_TYPES
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

# Each case has a name, the format to which the checkpoint is converted (or "" for the checkpoint itself) and settings.
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bf16 folder", "", {}),
    ("bf16 folder, int8 at load", "", {"quantization": "int8"}),
    ("bf16 folder, int4 at load", "", {"quantization": "int4"}),
    ("converted to int8", "int8", {}),
    ("converted to int4", "int4", {}),
    ("GGUF Q8_0", "Q8_0", {}),
    ("GGUF Q4_0", "Q4_0", {}),
)
CACHES: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "state_cache_memory_bytes": 256 << 20}
BLOCK = 16 << 20
GB = 1e9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="the name of the files in benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; the disk that is measured")
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1, help="how often each case is measured; the fastest counts")
    parser.add_argument(
        "--keep", action="store_true", help="keep the files in the folder, and use those that are there"
    )
    parser.add_argument("--tree", type=Path, help="another tree of this repository, which is measured as well")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="the cases that are measured; all by default")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is None and (arguments.name is None or arguments.folder is None):
        parser.error("--name and --folder are required")
    return arguments


def load(path: Path, settings: dict[str, Any]) -> None:
    """Loads an engine and prints a JSON object with the memory of this process. Runs in a process of its own."""
    imported, before = time.time(), memory_field("RssAnon")
    with Sampled() as sampled:
        llm = LLM(path, max_model_len=1024, max_num_seqs=1, **CACHES, **settings)
    info = llm.core.info
    found = {
        "imported": imported,
        "ready": time.time(),
        "weights": info.weight_bytes,
        "caches": info.kv_bytes + info.state_bytes,
        "before": before,
        "after": memory_field("RssAnon"),
        "most": sampled.most,
    }
    print(json.dumps(found))


class Sampled:
    """Samples the memory of this process every 10 ms, in a thread, while the object is used as a context manager."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, memory_field("RssAnon"))


def memory_field(name: str) -> int:
    """Returns a size in bytes from the status of this process. RssAnon is resident memory that is not of a file."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())


def drop_pages(files: list[Path]) -> None:
    """Removes the pages of the files from the page cache. Pages that are not on the disk yet are written first."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rate(files: list[Path]) -> float:
    """Returns the bytes per second at which the files are read from the disk, one after the other."""
    drop_pages(files)
    buffer, count, started = bytearray(BLOCK), 0, time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while size := opened.readinto(buffer):
                count += size
    return count / (time.monotonic() - started)


def measure(path: Path, settings: dict[str, Any], tree: Path | None = None) -> dict[str, Any]:
    """Measures one start of the engine, with the code of another tree if `tree` is given."""
    files = files_of(path)
    rate = read_rate(files)
    drop_pages(files)
    # The script of this tree runs with the modules of the other one.
    command = [sys.executable, str(Path(__file__).absolute()), "--load", str(path), "--settings", json.dumps(settings)]
    tree = tree or Path(__file__).absolute().parents[2]
    python_path = f"{tree / 'src'}:{tree}"
    environment = {**os.environ, "PYTHONPATH": python_path}
    started = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found = json.loads(output.splitlines()[-1])
    size = sum(file.stat().st_size for file in files)
    seconds, imports = found["ready"] - started, found.get("imported", started) - started
    drop_pages(files)
    server = serve_seconds(path, settings, python_path)
    return found | {"seconds": seconds, "imports": imports, "serve_seconds": server, "bytes": size, "rate": rate}


def serve_seconds(path: Path, settings: dict[str, Any], python_path: str) -> float:
    """Returns the time from the start of `jamba serve` until it is ready, to about 0.2 s."""
    options = {"max_model_len": 1024, "max_num_seqs": 1, **CACHES, **settings}
    arguments = [str(path), *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]
    started = time.monotonic()
    with running_server(arguments, 120, ("env", f"PYTHONPATH={python_path}")):
        return time.monotonic() - started


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the results of all cases. A converted checkpoint is removed before the next one is written, unless all
    files are kept."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        place = arguments.folder if arguments.keep else Path(root)
        source = place / "source"
        if not source.exists():
            source.mkdir()
            subprocess.run([sys.executable, "-c", WRITE, arguments.shape, str(source)], check=True)
        for name, form, settings in CASES:
            if arguments.cases and name not in arguments.cases:
                continue
            path, seconds = converted(source, form) if form else (source, 0.0)
            trees = {"before": arguments.tree} if arguments.tree else {}
            for label, tree in (trees | {"": None}).items():
                best = best_of(arguments.rounds, path, settings | {"threads": arguments.threads}, tree)
                yield {"case": name, "tree": label, "convert_seconds": seconds} | best
            if form and not arguments.keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def converted(source: Path, form: str) -> tuple[Path, float]:
    """Returns the path of the checkpoint in another format, and the time of the conversion, which is 0 if the file was
    there already."""
    path, started = source.parent / (f"{form}.gguf" if form in FILE_TYPES else form), time.monotonic()
    if path.exists():
        return path, 0.0
    convert = [sys.executable, "-m", "jamba_server.engine.convert", str(source), str(path), form]
    subprocess.run(convert, check=True)
    return path, time.monotonic() - started


def best_of(rounds: int, path: Path, settings: dict[str, Any], tree: Path | None) -> dict[str, Any]:
    return min((measure(path, settings, tree) for _ in range(rounds)), key=lambda run: run["seconds"])


# The checkpoint is written by another process, so that its memory is free again.
WRITE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import write_checkpoint
write_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""


def table(results: list[dict[str, Any]]) -> str:
    head = (
        "| case | files | disk | time at the disk's rate | imports | start-up | start-up without imports / disk | "
        "`jamba serve` | "
        "memory for the engine | of it caches, at most | weights, planned | memory / files | most memory | "
        "most memory / files | conversion |"
    )
    lines = [head, f"| --- |{' ---: |' * 14}"]
    for r in results:
        held, most = r["after"] - r["before"], r["most"] - r["before"]
        disk = r["bytes"] / r["rate"]
        cells = [
            f"{r['bytes'] / GB:.2f} GB",
            f"{r['rate'] / GB:.2f} GB/s",
            f"{disk:.1f} s",
            f"{r['imports']:.1f} s",
            f"{r['seconds']:.1f} s",
            f"{(r['seconds'] - r['imports']) / disk:.2f}",
            f"{r['serve_seconds']:.1f} s",
            f"{held / GB:.2f} GB",
            f"{r['caches'] / GB:.2f} GB",
            f"{r['weights'] / GB:.2f} GB",
            f"{held / r['bytes']:.2f}",
            f"{most / GB:.2f} GB",
            f"{most / r['bytes']:.2f}",
            f"{r['convert_seconds']:.0f} s" if r["convert_seconds"] else "",
        ]
        lines.append(f"| {r['case']}{', ' * bool(r['tree'])}{r['tree']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    if arguments.load is not None:
        load(arguments.load, arguments.settings)
        return
    report = {
        "date": utc_now(),
        "commit": describe_commit(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(("torch",)),
        "shape": arguments.shape,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "before": None if arguments.tree is None else describe_commit(arguments.tree),
    }
    results: list[dict[str, Any]] = []
    for result in measured(arguments):
        print(json.dumps(result), flush=True)
        results.append(result)
        conditions = "\n".join(f"* {key}: {value}" for key, value in report.items())
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{conditions}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
