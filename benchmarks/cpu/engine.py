"""Measures the engine on this CPU and compares its speed with the limits that memory bandwidth and matmul rate set.

    python -m benchmarks.cpu.engine --name cpu-shapes [--shapes small,moe,3b] [--formats bf16,int8,int4,int8+mamba]
        [--sequences 1,8,16,32,64] [--long 4096,16384] [--peer transformers]

The weights are dummies, decoding is greedy, and the engine runs in the measuring process. Prompts have four tokens
where decode is measured. Each shape and format runs in a process of its own, so the memory of that process is the
memory that this case needs.

The limit of a decode step is the longer of two times: the bytes of weights that it must read divided by the bandwidth,
and two operations per active parameter and sequence divided by the matmul rate. The limit of prefill is the second
time. The bandwidth drifts, so it is measured before and after each decode.

Long prompts are measured with the shape `small` in bf16. transformers is measured with `small` and `moe` in bf16, one
request at a time. The program writes benchmarks/results/NAME.json and NAME.md after every process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch

from benchmarks.shapes import (
    SHAPES,
    Format,
    active_parameters,
    matmul_rate,
    read_bandwidth,
    resident_bytes,
    weights_read,
    write_config,
)
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

RESULTS = Path(__file__).parents[1] / "results"
PREFILL_TOKENS = 512
# The number of steps of a decode run is chosen so that the run would take this number of seconds at half of the speed
# that the memory bandwidth allows. The number of steps is at least 8 and at most 64.
DECODE_SECONDS = 2.0
ROUNDS = 3
PEER_SHAPES = ("small", "moe")
PEER_TOKENS = 17
PEER_SECONDS = 240.0
GB = 1e9


class Cell:
    """Measures decode rate, prefill rate and memory of an engine with one model shape and weight format."""

    def __init__(self, shape: str, stored: Format, sequences: list[int], long: list[int]) -> None:
        self.sequences, self.long, self.stored = sequences, long, stored
        self.bandwidths, self.rate = [read_bandwidth()], matmul_rate()
        gc.collect()
        self.resident_before = resident_bytes()
        with tempfile.TemporaryDirectory() as name:
            write_config(shape, Path(name))
            self.config = load_model_config(Path(name))
            length = max([1024, *(tokens + 16 for tokens in long)])
            self.llm = LLM(
                name,
                load_format="dummy",
                threads=torch.get_num_threads(),
                max_model_len=length,
                max_num_seqs=max(sequences),
                **stored.settings,
            )
        self.random = Random(0)

    def run(self, count: int, length: int, tokens: int) -> float:
        """Returns the seconds that `count` requests of `length` prompt tokens and `tokens` output tokens take."""
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        vocabulary = range(3, self.config.vocab_size)
        prompts: list[list[int]] = [self.random.choices(vocabulary, k=length) for _ in range(count)]
        start = time.perf_counter()
        self.llm.generate(prompts, params)
        return time.perf_counter() - start

    def decode(self, count: int) -> dict[str, float]:
        """Measures the decode rate of `count` concurrent sequences in tokens per second.

        To leave out the time of the prompts, the time of a run with one output token is subtracted.
        """
        read = weights_read(self.config, count, self.stored)
        steps = max(8, min(64, int(DECODE_SECONDS * self.bandwidths[-1] / read / 2)))
        seconds = self.run(count, 4, steps + 1) - min(self.run(count, 4, 1) for _ in range(2))
        self.bandwidths.append(read_bandwidth())
        bandwidth = sum(self.bandwidths[-2:]) / 2
        limit = min(count * bandwidth / read, self.rate / (2 * active_parameters(self.config)))
        return {"tok_s": count * steps / seconds, "limit_tok_s": limit, "bandwidth": bandwidth}

    def decodes(self) -> dict[str, dict[str, float]]:
        """Measures the decode rate for each number of concurrent sequences in `self.sequences`.

        Each rate is measured ROUNDS times and the highest one is kept, because other programs can slow the machine down
        for minutes.
        """
        best: dict[str, dict[str, float]] = {}
        for count in self.sequences * ROUNDS:
            found = self.decode(count)
            if found["tok_s"] > best.get(str(count), {"tok_s": 0.0})["tok_s"]:
                best[str(count)] = found
        return best

    def prefill(self) -> dict[str, float]:
        seconds = min(self.run(1, PREFILL_TOKENS, 1) for _ in range(3))
        return {"tok_s": PREFILL_TOKENS / seconds, "limit_tok_s": self.rate / (2 * active_parameters(self.config))}

    def long_prompt(self, tokens: int) -> dict[str, float]:
        """Measures the prefill rate of a prompt of `tokens` tokens, and how much this process's memory grows.

        `growth_bytes` is the peak growth; `kv_bytes` is the memory of the prompt's keys and values for comparison.
        """
        # Writing 5 to this file resets the value VmHWM, the peak of the resident memory.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        seconds = self.run(1, tokens, 1)
        peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        info = self.llm.core.info
        pages = info.kv_bytes / info.num_kv_blocks * (tokens / info.block_size)
        return {"tok_s": tokens / seconds, "growth_bytes": peak - before, "kv_bytes": pages}

    def measure(self) -> dict[str, Any]:
        self.run(1, 4, 4)
        info = self.llm.core.info
        result: dict[str, Any] = {
            "format": self.stored.name,
            "parameters": info.num_parameters,
            "matmul_rate": self.rate,
            "kernels": info.kernels,
            "load_seconds": info.load_seconds,
            "prefill": self.prefill(),
            "decode": self.decodes(),
            "bandwidths": self.bandwidths,
        }
        self.run(8, 4, 4)
        result["memory"] = {
            "resident": resident_bytes() - self.resident_before,
            "weights": info.weight_bytes,
            "caches": info.kv_bytes + info.state_bytes,
        }
        # The memory growth of the first long prompt includes the buffers for a prefill chunk. Later prompts reuse these
        # buffers.
        result["long"] = {str(tokens): self.long_prompt(tokens) for tokens in self.long}
        return result


def measure_transformers(shape: str, threads: int) -> dict[str, Any]:
    """Measures the decode and prefill rates of transformers' `generate` on a model shape, one request at a time.

    Decode is measured after a prompt of four tokens, and prefill with prompts of 512 tokens.
    """
    random = Random(0)
    lengths = [(4, 3), (4, PEER_TOKENS), (PREFILL_TOKENS, 2), (PREFILL_TOKENS, 2)]
    vocabulary = range(3, SHAPES[shape]["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        job = {
            "model": name,
            "device": "cpu",
            "dtype": "bfloat16",
            "load_format": "dummy",
            "threads": threads,
            "requests": [{"prompt": random.choices(vocabulary, k=n), "max_tokens": tokens} for n, tokens in lengths],
            "max_seconds": PEER_SECONDS,
        }
        script = Path(__file__).parents[1] / "http" / "peer_transformers.py"
        answer = json.loads(subprocess.run([sys.executable, script], input=json.dumps(job), **_PIPE).stdout)
    decode, *prefills = answer["records"]
    seconds = decode["arrivals"][-1] - decode["arrivals"][0]
    first = [record["arrivals"][0] - record["start"] for record in prefills]
    return {
        "shape": shape,
        "conditions": answer["conditions"],
        "decode_tok_s": (PEER_TOKENS - 1) / seconds,
        "prefill_tok_s": PREFILL_TOKENS / min(first) if first else None,
    }


_PIPE: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "check": True}


def measure_apart(shape: str, stored: Format, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the measurements of one model shape and weight format in a new process and returns their results.

    OMP_WAIT_POLICY=PASSIVE lets idle torch threads sleep, as in the server.
    """
    long = arguments.long if shape == "small" and stored.name == "bf16" else ""
    command = ["-m", "benchmarks.cpu.engine", "--cell", shape, stored.name, "--sequences", arguments.sequences]
    command += ["--threads", str(arguments.threads), "--long", long]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    finished = subprocess.run([sys.executable, *command], env=environment, **_PIPE)
    return {"shape": shape} | json.loads(finished.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]], sequences: list[int]) -> list[str]:
    names = ["shape", "format", "prefill 512", *(f"decode, {n}" for n in sequences)]
    names += ["memory, weights + caches (GB)", "read, matmul"]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]

    def cell(value: dict[str, float]) -> str:
        return f"{value['tok_s']:,.1f} ({value['tok_s'] / value['limit_tok_s']:.0%})"

    for r in results:
        memory = r["memory"]
        cells = [r["shape"], r["format"], cell(r["prefill"]), *(cell(r["decode"][str(n)]) for n in sequences)]
        cells.append(f"{memory['resident'] / GB:.2f}, {(memory['weights'] + memory['caches']) / GB:.2f}")
        low, high = min(r["bandwidths"]) / GB, max(r["bandwidths"]) / GB
        cells.append(f"{low:.0f}-{high:.0f} GB/s, {r['matmul_rate'] / 1e12:.2f} TFLOP/s")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def to_markdown(name: str, report: dict[str, Any], sequences: list[int]) -> str:
    conditions = report["conditions"]
    lines = [f"# {name}", "", f"Tok/s (share of the limit), {conditions['threads']} threads, "]
    lines[-1] += f"{conditions['machine']['cpu']}, {conditions['date']}."
    lines += ["", *table(report["results"], sequences)]
    long = [(r, tokens, value) for r in report["results"] for tokens, value in r["long"].items()]
    if long:
        lines += [
            "",
            "| prompt | tok/s | growth of the process (MB) | its KV pages (MB) |",
            "| --- | --- | --- | --- |",
        ]
    for r, tokens, value in long:
        growth, pages = value["growth_bytes"] / 1e6, value["kv_bytes"] / 1e6
        lines.append(f"| {r['shape']} {r['format']}, {tokens} | {value['tok_s']:,.0f} | {growth:,.0f} | {pages:,.0f} |")
    if report["peers"]:
        lines += ["", "| transformers, one request | decode tok/s | prefill tok/s |", "| --- | --- | --- |"]
    for peer in report["peers"]:
        prefill = "-" if peer["prefill_tok_s"] is None else f"{peer['prefill_tok_s']:,.1f}"
        lines.append(f"| {peer['shape']} | {peer['decode_tok_s']:,.2f} | {prefill} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of the result files, without extension")
    parser.add_argument("--shapes", default="small,moe,3b", help="model shapes to measure")
    parser.add_argument("--formats", default="bf16", help="weight formats to measure, such as bf16,int8,int8+mamba")
    parser.add_argument("--sequences", default="1,8,16,32", help="numbers of sequences that decode at the same time")
    parser.add_argument("--long", default="4096,16384", help="lengths of the long prompts, in tokens")
    parser.add_argument("--peer", choices=["transformers"], help="also measure this library on the same shapes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument(
        "--cell", nargs=2, metavar=("SHAPE", "FORMAT"), help="measure one case in this process and print it as JSON"
    )
    arguments = parser.parse_args()
    if not (arguments.name or arguments.cell):
        parser.error("--name is required")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    sequences = [int(n) for n in arguments.sequences.split(",")]
    if arguments.cell:
        shape, stored = arguments.cell[0], Format.parse(arguments.cell[1])
        long = [int(n) for n in arguments.long.split(",") if n]
        print(json.dumps(Cell(shape, stored, sequences, long).measure()))
        return
    conditions: dict[str, Any] = {
        "date": utc_now(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(["torch", "numpy"]),
        "threads": arguments.threads,
    }
    report: dict[str, Any] = {"conditions": conditions, "results": [], "peers": []}
    RESULTS.mkdir(exist_ok=True)

    def write() -> None:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(to_markdown(arguments.name, report, sequences))

    for shape in arguments.shapes.split(","):
        for name in arguments.formats.split(","):
            report["results"].append(measure_apart(shape, Format.parse(name), arguments))
            write()
        if arguments.peer and shape in PEER_SHAPES:
            report["peers"].append(measure_transformers(shape, arguments.threads))
            write()
    print((RESULTS / f"{arguments.name}.md").read_text())


if __name__ == "__main__":
    main()
