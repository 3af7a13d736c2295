"""Compares this server with llama.cpp's server on the same GGUF files, in one run.

    python -m benchmarks.http.gguf_peers --name gguf-peers --llama-server PATH --llama-quantize PATH --files FOLDER

For each shape, a checkpoint with random weights is converted to an F16 file. llama.cpp's quantiser converts this file
to the other types. The files are kept in the folder FOLDER, so that a second run finds them there. Time depends on
shapes and not on the values of weights. Every client sends prompts of 128 random token ids and asks for 64 tokens,
greedily. For each file, this server and llama.cpp's take turns for --rounds rounds, and the median of a server's rounds
counts, because the machine's speed may change during the run. A measurement is repeated if a server closes a
connection between two requests, which llama.cpp's server does now and then. The repetition has other prompts, because
the server has those of the first attempt in its cache. Writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.checkpoints import write_checkpoint
from benchmarks.http.peers import llama_server
from benchmarks.http.serving import RESULTS, announcement, describe_commit, running_server
from benchmarks.http.shapes import measure_level
from benchmarks.shapes import SHAPES, matmul_rate, read_bandwidth
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.cli.bench.report import Level

START_TIMEOUT = 600.0
ATTEMPTS = 5  # how often a measurement is tried
SEEDS = 100  # seeds of prompts for each number of clients
MAX_LEN = 512  # tokens of the longest sequence, for both servers
OURS, LLAMA = "jamba-server", "llama.cpp"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--llama-server", type=Path, required=True, help="path of llama.cpp's server")
    parser.add_argument("--llama-quantize", type=Path, required=True, help="path of llama.cpp's quantiser")
    parser.add_argument("--llama-version", default="not named", help="version of llama.cpp, for the report")
    parser.add_argument("--files", type=Path, required=True, help="folder for the GGUF files")
    parser.add_argument("--shapes", default="small,moe", help="model shapes to measure")
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K_M", help="types of files to measure")
    parser.add_argument("--clients", default="1,8", help="numbers of clients to measure")
    parser.add_argument("--threads", type=int, default=2, help="threads of each server")
    parser.add_argument("--rounds", type=int, default=3, help="how often each server is measured with each file")
    parser.add_argument("--options", default="", help="more options of this server, separated by spaces")
    return parser.parse_args()


def quantized_file(flags: argparse.Namespace, shape: str, kind: str) -> Path:
    """Returns the path of a GGUF file of a shape and type, which is written if it does not exist."""
    path: Path = flags.files / f"{shape}-{kind}.gguf"
    if path.exists():
        return path
    plain: Path = flags.files / f"{shape}-F16.gguf"
    if not plain.exists():
        with tempfile.TemporaryDirectory(dir=flags.files) as folder:
            write_checkpoint(shape, Path(folder))
            convert = [sys.executable, "-m", "jamba_server", "convert", folder, str(plain), "--to", "gguf"]
            subprocess.run([*convert, "--type", "F16"], check=True)
    if kind != "F16":
        subprocess.run([flags.llama_quantize, plain, path, kind, str(flags.threads)], check=True, capture_output=True)
    return path


@contextmanager
def our_server(flags: argparse.Namespace, file: Path, slots: int, log_lines: list[str]) -> Generator[str]:
    """Starts this server with a file, yields its URL, and writes what it announced about the model to `log_lines`."""
    sizes = ["--max-model-len", str(MAX_LEN), "--max-num-seqs", str(slots), "--threads", str(flags.threads)]
    with running_server([str(file), *sizes, *flags.options.split()], START_TIMEOUT) as (url, log):
        log_lines[:] = announcement(log)
        yield url


def measured(url: str, vocab_size: int, clients: int) -> Level:
    for seed in range(ATTEMPTS - 1):
        with suppress(SystemExit):
            return measure_level(url, vocab_size, str(clients), max(3, 2 * clients), 1, SEEDS * clients + seed)[0]
    return measure_level(url, vocab_size, str(clients), max(3, 2 * clients), 1, SEEDS * clients + SEEDS - 1)[0]


def measure_file(flags: argparse.Namespace, shape: str, kind: str) -> dict[str, Any]:
    """Measures both servers with one file, in turns. Returns lists with a result for each round."""
    file, clients = quantized_file(flags, shape, kind), [int(count) for count in flags.clients.split(",")]
    vocab_size, lines = SHAPES[shape]["vocab_size"], list[str]()
    servers: Mapping[str, Callable[[], AbstractContextManager[str]]] = {
        OURS: lambda: our_server(flags, file, max(clients), lines),
        LLAMA: lambda: llama_server(flags.llama_server, file, slots=max(clients), threads=flags.threads),
    }
    found: dict[str, Any] = {name: {str(count): [] for count in clients} for name in servers}
    for _ in range(flags.rounds):
        for name, start in servers.items():
            with start() as url:
                for count in clients:
                    level = measured(url, vocab_size, count)
                    found[name][str(count)].append(msgspec.to_builtins(level))
    return {"shape": shape, "type": kind, "bytes": file.stat().st_size, "server": lines, **found}


def median(rounds: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(value(level) for level in rounds)


def rows(found: dict[str, Any]) -> list[str]:
    """Returns the table's rows for one file: one for each number of clients."""
    lines: list[str] = []
    for count in found[OURS]:
        rate = {name: median(found[name][count], lambda level: level["output_throughput"]) for name in (OURS, LLAMA)}
        first = {name: median(found[name][count], lambda level: level["ttft_ms"]["p50"]) for name in (OURS, LLAMA)}
        lines.append(
            f"| {found['shape']} | {found['type']} | {count} | {rate[OURS]:.1f} | {rate[LLAMA]:.1f} | "
            f"{rate[OURS] / rate[LLAMA]:.2f} | {first[OURS]:.0f} | {first[LLAMA]:.0f} |"
        )
    return lines


def to_markdown(flags: argparse.Namespace, report: dict[str, Any]) -> str:
    machine = describe_machine()
    lines = [
        f"# {flags.name}",
        "",
        f"128 tokens in, 64 out, greedy, over HTTP, all in one run: {utc_now()}, commit {describe_commit()}, "
        f"{flags.threads} threads, medians of {flags.rounds} rounds in turns.",
        f"{machine.cpu}, {machine.cores} cores; reads {report['bandwidth'] / 1e9:.0f} GB/s; torch's bf16 product "
        f"{report['matmul_rate'] / 1e12:.2f} TFLOP/s; {json.dumps(describe_versions(('torch',)))}.",
        f"llama.cpp: {flags.llama_version}. Options of jamba-server: {flags.options or 'none'}.",
        "",
        "| shape | type | clients | jamba-server tok/s | llama.cpp tok/s | ratio | TTFT p50 (ms) | llama.cpp's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(line for found in report["files"] for line in rows(found)),
        "",
        "```",
        *(f"{found['shape']} {found['type']}: {line}" for found in report["files"] for line in found["server"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    flags = parse_arguments()
    flags.files.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"bandwidth": read_bandwidth(), "matmul_rate": matmul_rate(), "files": []}
    for shape in flags.shapes.split(","):
        for kind in flags.types.split(","):
            report["files"].append(measure_file(flags, shape, kind))
            (RESULTS / f"{flags.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
            (RESULTS / f"{flags.name}.md").write_text(to_markdown(flags, report))
    sys.stdout.write((RESULTS / f"{flags.name}.md").read_text())


if __name__ == "__main__":
    main()
