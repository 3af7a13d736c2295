"""Measures speed and memory of the server over HTTP at three model shapes, under the load that llama.cpp's server got.

    python -m benchmarks.http.shapes --name http-shapes [--shapes small,moe,3b] [--formats bf16,int8,int4+mamba]

Prompts have 128 tokens, replies have 64 tokens, and decoding is greedy. Each shape and format has a `jamba serve` of
its own with dummy weights and a tokenizer of the shape's vocabulary. The results are:

* the output tokens per second at 1, 8 and 16 clients;
* the TTFT of bursts of 8 requests on an idle server, as the median of three bursts;
* the peak memory of all server processes together.

The bandwidth is measured before each server starts. The limit is the rate at which decode steps could read their
weights, as if prompts took no time. llama.cpp's figures are from the same class of machine, but from another run.
The program writes benchmarks/results/NAME.json and NAME.md after every server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import decoders, models, normalizers

from benchmarks.http.serving import announcement, describe_commit, running_server
from benchmarks.shapes import SHAPES, Format, matmul_rate, read_bandwidth, weights_read, write_config
from jamba_server.engine.model_config import load_model_config
from jamba_server.server.cli.bench.command import BenchOptions, run_bench
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.cli.bench.report import Level

RESULTS = Path(__file__).parents[1] / "results"
INPUT_LEN, OUTPUT_LEN = 128, 64
BURST, BURSTS = 8, 3
START_TIMEOUT = 600.0
MEMORY_INTERVAL = 0.5  # The number of seconds between two measurements of the server's memory.
LLAMA_SOURCE = (
    "llama.cpp server -np 8, same class of machine, other run; its bf16, Q8_0 and Q4_K_M for 16, 8 and 4 bits"
)
# Output tokens per second of llama.cpp: {(model shape, weight format): {number of clients: rate}}.
LLAMA: dict[tuple[str, str], dict[int, str]] = {
    ("small", "bf16"): {1: "118-160", 8: "370", 16: "283"},
    ("small", "int8"): {1: "188", 8: "228"},
    ("moe", "bf16"): {1: "19.0", 8: "36.5"},
    ("moe", "int8"): {1: "19", 8: "24"},
    ("moe", "int4"): {1: "38", 8: "46"},
    ("3b", "bf16"): {1: "4.0", 8: "11.5"},
    ("3b", "int8"): {1: "4.6", 8: "8.4"},
    ("3b", "int4"): {1: "9.2", 8: "11.2"},
}


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Writes a tokenizer that can turn every token id below `vocab_size` into text.

    The vocabulary has four special tokens, the 256 bytes and numbered words.
    """
    special = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [f"▁w{number}" for number in range(vocab_size - len(pieces))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|unk|>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = {"pad_token": special[0], "bos_token": special[1], "eos_token": special[2], "unk_token": special[3]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def descendants(pid: int | str) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def memory_of_children() -> int:
    """Returns the memory of this process's descendants in bytes. Memory that n processes share is divided by n."""
    total = 0
    for pid in descendants("self"):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # The process ended after `descendants` had listed its id.
        total += 1024 * int(text.split("\nPss:")[1].split()[0])
    return total


@contextmanager
def watched_memory() -> Generator[list[int]]:
    """Yields a list with one number, the peak memory of this process's descendants in bytes.

    A thread updates the number every MEMORY_INTERVAL seconds until the context ends.
    """
    largest, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(MEMORY_INTERVAL):
            largest[0] = max(largest[0], memory_of_children())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        ended.set()
        thread.join()


def measure_level(url: str, vocab_size: int, clients: str, prompts: int, warm_ups: int, seed: int) -> list[Level]:
    options = BenchOptions(
        concurrency=clients,
        num_prompts=prompts,
        num_warmups=warm_ups,
        input_len=INPUT_LEN,
        output_len=OUTPUT_LEN,
        vocab_size=vocab_size,
        seed=seed,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        levels = run_bench(url, options, progress).levels
    for level in levels:
        if level.failed or level.short_replies or level.completed < level.planned:
            sys.exit(f"{level.completed} of {level.planned} requests completed in full: {level.errors}")
    return levels


def measure(shape: str, stored: Format, clients: list[int], threads: int) -> dict[str, Any]:
    vocab_size = SHAPES[shape]["vocab_size"]
    result: dict[str, Any] = {"shape": shape, "format": stored.name}
    result |= {"bandwidth": read_bandwidth(), "matmul_rate": matmul_rate()}
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        write_tokenizer(vocab_size, Path(name))
        config = load_model_config(Path(name))
        arguments = [name, "--load-format", "dummy", "--threads", str(threads), "--max-model-len", "1024"]
        arguments += ["--max-num-seqs", str(max(clients)), *stored.flags]
        with running_server(arguments, START_TIMEOUT) as (url, log), watched_memory() as memory:
            result["clients"] = {}
            for count in clients:
                level = measure_level(url, vocab_size, str(count), max(6, 4 * count), count, count)[0]
                limit = count * result["bandwidth"] / weights_read(config, count, stored)
                result["clients"][str(count)] = msgspec.to_builtins(level) | {"limit_tok_s": limit}
            bursts = measure_level(url, vocab_size, ",".join([str(BURST)] * BURSTS), BURST, 0, 1000)
            result["memory"] = memory[0]
            result["server"] = announcement(log)
    first = [level.ttft_ms for level in bursts if level.ttft_ms]
    result["burst_ttft_ms"] = {
        "p50": statistics.median(d.p50 for d in first),
        "p95": statistics.median(d.p95 for d in first),
    }
    return result


def to_markdown(name: str, report: dict[str, Any], clients: list[int]) -> str:
    conditions = report["conditions"]
    text = f"# {name}\n\n{INPUT_LEN} tokens in, {OUTPUT_LEN} out, greedy, dummy weights. Output tok/s (share of the "
    text += f"decode limit). {conditions['threads']} threads, {conditions['machine']['cpu']}, "
    text += f"{conditions['date']}, commit {conditions['commit']}.\n\n"
    names = ["shape", "format", *(f"{n} clients" for n in clients), "llama.cpp", f"TTFT of {BURST}: p50, p95 (ms)"]
    names += ["memory (GB)", "read, matmul"]
    text += f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n"
    for r in report["results"]:
        cells = [r["shape"], r["format"]]
        for n in clients:
            level = r["clients"][str(n)]
            rate = level["output_throughput"]
            cells.append(f"{rate:,.1f} ({rate / level['limit_tok_s']:.0%})")
        peer = LLAMA.get((r["shape"], r["format"].removesuffix("+mamba")), {})
        cells.append(" / ".join(peer.get(n, "-") for n in clients))
        burst = r["burst_ttft_ms"]
        cells.append(f"{burst['p50']:,.0f}, {burst['p95']:,.0f} ({burst['p50'] / burst['p95']:.2f})")
        cells.append(f"{r['memory'] / 1e9:.2f}")
        cells.append(f"{r['bandwidth'] / 1e9:.0f} GB/s, {r['matmul_rate'] / 1e12:.2f} TFLOP/s")
        text += f"| {' | '.join(cells)} |\n"
    text += f"\nllama.cpp: output tok/s at the same numbers of clients; {LLAMA_SOURCE}.\n"
    servers = [[f"{r['shape']} {r['format']}", *r["server"]] for r in report["results"]]
    return text + "\n```\n" + "\n\n".join("\n".join(lines) for lines in servers) + "\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--shapes", default="small,moe,3b", help="model shapes to measure")
    parser.add_argument("--formats", default="bf16", help="weight formats to measure, such as bf16,int8,int4+mamba")
    parser.add_argument("--clients", default="1,8,16", help="numbers of clients to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clients = [int(n) for n in arguments.clients.split(",")]
    conditions: dict[str, Any] = {
        "date": utc_now(),
        "commit": describe_commit(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(["torch", "fastapi", "uvicorn", "tokenizers"]),
        "threads": arguments.threads,
        "llama.cpp": LLAMA_SOURCE,
    }
    report: dict[str, Any] = {"conditions": conditions, "results": []}
    RESULTS.mkdir(exist_ok=True)
    for shape in arguments.shapes.split(","):
        for name in arguments.formats.split(","):
            report["results"].append(measure(shape, Format.parse(name), clients, arguments.threads))
            (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")
            (RESULTS / f"{arguments.name}.md").write_text(to_markdown(arguments.name, report, clients))
    print((RESULTS / f"{arguments.name}.md").read_text())


if __name__ == "__main__":
    main()
