"""Measures how long the engine takes to start from files on a disk, and how much memory it takes.

    python -m benchmarks.cpu.startup --name startup --folder FOLDER [--shape 3b] [--threads 2]

A checkpoint with random weights is written to FOLDER in bfloat16 and converted to each format, one after the other. All
files are removed at the end. For each case, the pages of the files are dropped from the system's page cache and the
files are read once, which gives the disk's read rate. After the pages have been dropped again, a new process loads the
engine. Its time runs from the start of the process, so it includes the imports, until the engine can take requests.

The time that the disk needs is the size of the files divided by the read rate of the same case. Memory is that of the
process: what loading adds to its own memory, without the pages of mapped files, and its largest resident memory, which
includes them. Caches take memory only as far as they were used. The planned weights are those that the engine reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.http.serving import RESULTS, describe_commit
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
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is None and (arguments.name is None or arguments.folder is None):
        parser.error("--name and --folder are required")
    return arguments


def load(path: Path, settings: dict[str, Any]) -> None:
    """Loads an engine and prints a JSON object with the memory of this process. Runs in a process of its own."""
    before = memory_field("RssAnon")
    llm = LLM(path, max_model_len=1024, max_num_seqs=1, **CACHES, **settings)
    info = llm.core.info
    found = {
        "ready": time.time(),
        "weights": info.weight_bytes,
        "caches": info.kv_bytes + info.state_bytes,
        "before": before,
        "after": memory_field("RssAnon"),
        "most": memory_field("VmHWM"),
    }
    print(json.dumps(found))


def memory_field(name: str) -> int:
    """Returns a size in bytes from the status of this process. RssAnon is resident memory that is not of a file, and
    VmHWM is the largest resident memory so far."""
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


def measure(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    files = files_of(path)
    rate = read_rate(files)
    drop_pages(files)
    command = [sys.executable, "-m", "benchmarks.cpu.startup", "--load", str(path), "--settings", json.dumps(settings)]
    started = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    size = sum(file.stat().st_size for file in files)
    return found | {"seconds": found["ready"] - started, "bytes": size, "rate": rate}


def measured(folder: Path, shape: str, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the results of all cases. A converted checkpoint is removed before the next one is written."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        source = Path(root) / "source"
        source.mkdir()
        subprocess.run([sys.executable, "-c", WRITE, shape, str(source)], check=True)
        for name, form, settings in CASES:
            with tempfile.TemporaryDirectory(dir=root) as place:
                path, seconds = source, 0.0
                if form:
                    path = Path(place) / ("model.gguf" if form in FILE_TYPES else "model")
                    started = time.monotonic()
                    convert = [sys.executable, "-m", "jamba_server.engine.convert", str(source), str(path), form]
                    subprocess.run(convert, check=True)
                    seconds = time.monotonic() - started
                runs = [measure(path, settings | {"threads": threads}) for _ in range(rounds)]
                best = min(runs, key=lambda run: run["seconds"])
                yield {"case": name, "convert_seconds": seconds} | best


# The checkpoint is written by another process, so that its memory is free again.
WRITE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import write_checkpoint
write_checkpoint(sys.argv[1], Path(sys.argv[2]))
"""


def table(results: list[dict[str, Any]]) -> str:
    head = (
        "| case | files | disk | time at the disk's rate | start-up | memory for the engine | of it caches, at most | "
    )
    head += "weights, planned | memory / files | most resident, with mapped files | conversion |"
    lines = [head, f"| --- |{' ---: |' * 10}"]
    for r in results:
        held = r["after"] - r["before"]
        cells = [
            f"{r['bytes'] / GB:.2f} GB",
            f"{r['rate'] / GB:.2f} GB/s",
            f"{r['bytes'] / r['rate']:.1f} s",
            f"{r['seconds']:.1f} s",
            f"{held / GB:.2f} GB",
            f"{r['caches'] / GB:.2f} GB",
            f"{r['weights'] / GB:.2f} GB",
            f"{held / r['bytes']:.2f}",
            f"{r['most'] / GB:.2f} GB",
            f"{r['convert_seconds']:.0f} s" if r["convert_seconds"] else "",
        ]
        lines.append(f"| {r['case']} | {' | '.join(cells)} |")
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
    }
    results: list[dict[str, Any]] = []
    for result in measured(arguments.folder, arguments.shape, arguments.threads, arguments.rounds):
        print(json.dumps(result), flush=True)
        results.append(result)
        conditions = "\n".join(f"* {key}: {value}" for key, value in report.items())
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{conditions}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
