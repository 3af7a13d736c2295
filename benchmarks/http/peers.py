"""Compares output rate and time to first token of this server, llama.cpp's server and transformers at one model shape.

    python -m benchmarks.http.peers --name peers-3b --gguf FILE --llama-server PATH [--clients 1,8] [--threads 2]

FILE must be a bf16 GGUF file of the shape, which llama.cpp's convert_hf_to_gguf.py makes of a Hugging Face folder.
Weights are random: time depends on the shape and not on the values. Every client sends prompts of 128 random token ids
and asks for 64 tokens, greedily. transformers runs one request after the other, so its rate is the same for any number
of clients; one request is timed. Writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.http.serving import RESULTS, describe_commit, running_server, stop
from benchmarks.http.shapes import measure_level, write_tokenizer
from benchmarks.shapes import SHAPES, matmul_rate, read_bandwidth, write_config
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.cli.bench.report import Level

SHAPE, INPUT_LEN, OUTPUT_LEN = "3b", 128, 64
START_TIMEOUT = 600.0  # The largest allowed number of seconds from a server's start until the server is ready.
PORT = 8427  # The number of the port on which llama.cpp's server listens.


@contextmanager
def llama_server(program: Path, gguf: Path, *, slots: int, threads: int) -> Generator[str]:
    """Starts llama.cpp's server and yields its URL when the model has loaded."""
    url = f"http://127.0.0.1:{PORT}"
    command = [program, "-m", gguf, "-t", str(threads), "-np", str(slots), "-c", str(slots * 512), "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass  # The server does not listen on its port yet, so the loop tries again.
            time.sleep(0.5)
        else:
            sys.exit(f"{program} is not ready after {START_TIMEOUT:g} s (status {process.poll()}).")
        yield url
    finally:
        stop(process)


def measure_transformers(folder: str, threads: int) -> dict[str, Any]:
    """Times one request with transformers' `generate`, after a short request to warm up.

    Returns the conditions and the results.
    """
    tokens = [random.Random(0).randrange(3, SHAPES[SHAPE]["vocab_size"]) for _ in range(INPUT_LEN)]
    request = {"prompt": tokens, "max_tokens": OUTPUT_LEN}
    job = {"model": folder, "device": "cpu", "dtype": "bfloat16", "load_format": "dummy", "threads": threads}
    job |= {"requests": [{"prompt": tokens[:4], "max_tokens": 2}, request], "max_seconds": 3600}
    script = Path(__file__).with_name("peer_transformers.py")
    result = subprocess.run(
        [sys.executable, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout)


def rate(record: dict[str, Any]) -> float:
    """Returns the output rate of one request with transformers, in tokens per second."""
    return record["output_tokens"] / (record["end"] - record["start"])


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    clients = [int(count) for count in flags.clients.split(",")]
    vocab_size = SHAPES[SHAPE]["vocab_size"]
    found: dict[str, Any] = {"bandwidth": read_bandwidth(), "matmul_rate": matmul_rate()}
    with tempfile.TemporaryDirectory() as folder:
        write_config(SHAPE, Path(folder))
        write_tokenizer(vocab_size, Path(folder))
        sizes = ["--max-model-len", "512", "--max-num-seqs", str(max(clients))]
        arguments = [folder, "--load-format", "dummy", "--threads", str(flags.threads), *sizes]
        with running_server(arguments, START_TIMEOUT) as (url, _):
            found["jamba-server"] = measure_clients(url, vocab_size, clients)
        with llama_server(flags.llama_server, flags.gguf, slots=max(clients), threads=flags.threads) as url:
            found["llama.cpp"] = measure_clients(url, vocab_size, clients)
        found["transformers"] = measure_transformers(folder, flags.threads)
    return found


def measure_clients(url: str, vocab_size: int, clients: list[int]) -> dict[int, Level]:
    """Measures the speed of the server at `url` for each number of concurrent clients in the list `clients`.

    Each client sends one request, except that a single client sends two requests.
    """
    return {
        count: measure_level(url, vocab_size, str(count), prompts=max(2, count), warm_ups=1, seed=count)[0]
        for count in clients
    }


def to_markdown(name: str, flags: argparse.Namespace, found: dict[str, Any]) -> str:
    machine = describe_machine()
    [record] = found["transformers"]["records"]
    slow = f"{rate(record):.2f}"
    first = f"{(record['arrivals'][0] - record['start']):.1f}"
    header = [f"{count} client{'s' if count > 1 else ''}" for count in found["jamba-server"]]
    lines = [
        f"# {name}",
        "",
        f"The shape of the 3B models with random weights in bf16, {INPUT_LEN} tokens in, {OUTPUT_LEN} out, over HTTP,",
        f"all in one run: {utc_now()}, commit {describe_commit()}, {flags.threads} threads.",
        f"{machine.cpu}, {machine.cores} cores; reads {found['bandwidth'] / 1e9:.0f} GB/s; torch's bf16 product "
        f"{found['matmul_rate'] / 1e12:.3f} TFLOP/s; {json.dumps(describe_versions(('torch', 'transformers')))}.",
        f"llama.cpp: {flags.llama_version}.",
        "",
        f"| output tokens/s | {' | '.join(header)} |",
        "| --- |" + " ---: |" * len(header),
    ]
    for server in ("jamba-server", "llama.cpp"):
        lines.append(f"| {server} | {' | '.join(f'{v.output_throughput:.1f}' for v in found[server].values())} |")
    lines.append(f"| transformers, one request at a time | {' | '.join([slow] * len(header))} |")
    lines += ["", f"| time to first token, p50, s | {' | '.join(header)} |", "| --- |" + " ---: |" * len(header)]
    for server in ("jamba-server", "llama.cpp"):
        lines.append(f"| {server} | {' | '.join(f'{v.ttft_ms.p50 / 1000:.1f}' for v in found[server].values())} |")
    lines.append(f"| transformers, one request | {first} |" + " - |" * (len(header) - 1))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--gguf", type=Path, required=True, help="bf16 GGUF file of the 3B shape")
    parser.add_argument("--llama-server", type=Path, required=True, help="path of llama.cpp's server")
    parser.add_argument("--llama-version", default="not named", help="version of llama.cpp, for the report")
    parser.add_argument("--clients", default="1,8", help="numbers of clients to measure")
    parser.add_argument("--threads", type=int, default=2, help="threads of every server")
    flags = parser.parse_args()
    found = measure(flags)
    (RESULTS / f"{flags.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    markdown = to_markdown(flags.name, flags, found)
    (RESULTS / f"{flags.name}.md").write_text(markdown)
    sys.stdout.write(markdown)


if __name__ == "__main__":
    main()
