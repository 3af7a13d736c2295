"""Runs the part `http` of the GPU check: starts a server with random weights, and measures it with the command `jamba
bench`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.gpu.predict import Ceilings, decode_work, measure_ceilings
from benchmarks.gpu.record import Job, Record
from benchmarks.http.serving import announcement, running_server
from benchmarks.http.shapes import write_tokenizer
from benchmarks.shapes import SHAPES, Format, write_config
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.server.cli.bench.command import BenchOptions, run_bench

CLIENTS = {"tiny": (1, 2)}
MOST_CLIENTS = (1, 8, 64, 256)
INPUT_LEN, OUTPUT_LEN = 128, 128
LEVEL_SECONDS = 60.0
START_TIMEOUT = 500.0


def flags(options: dict[str, Any]) -> list[str]:
    """Converts fields of the class `EngineConfig` to command-line options of the command `jamba serve`."""
    found: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            found += [part for item in value.items() for part in (f"--{name}", "=".join(item))]
        else:
            found += [f"--{name}", str(value)]
    return found


def run(job: Job, record: Record) -> None:
    clients = CLIENTS.get(job.shape, MOST_CLIENTS)
    wanted = [job.key("clients", count) for count in clients]
    if all(key in record.rows for key in wanted):
        return
    ceilings = measure_ceilings(job.device)
    record.start_run(job, before=msgspec.to_builtins(ceilings))
    with tempfile.TemporaryDirectory() as folder:
        write_config(job.shape, Path(folder))
        write_tokenizer(SHAPES[job.shape]["vocab_size"], Path(folder))
        config = load_model_config(Path(folder))
        arguments = [folder, "--device", job.device, "--load-format", "dummy", "--shutdown-timeout", "1"]
        arguments += ["--max-model-len", "2048", "--max-num-seqs", str(max(clients))]
        arguments += [*Format.parse(job.format).flags, *flags(job.options)]
        begun = time.perf_counter()
        with running_server(arguments, START_TIMEOUT) as (url, log):
            ready = time.perf_counter() - begun
            record.note(server=announcement(log))
            record.cell(job.key("first reply"), lambda: first_reply(url, ready, job.shape))
            for count, key in zip(clients, wanted, strict=True):
                record.cell(key, lambda count=count: load(url, job, config, count, ceilings))
    record.note(after=msgspec.to_builtins(measure_ceilings(job.device)))


def first_reply(url: str, ready: float, shape: str) -> dict[str, Any]:
    """Measures the seconds from the first request to a new server until the reply has arrived. The reply has one token.

    `until_ready` is the time in seconds from the start of the server's process until the server is ready. This time
    includes loading the weights.
    """
    begun = time.perf_counter()
    prompt = [5 + i % (SHAPES[shape]["vocab_size"] - 5) for i in range(INPUT_LEN)]
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    name = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
    reply = httpx.post(f"{url}/v1/completions", json={"model": name, **body}, timeout=300)
    reply.raise_for_status()
    return {"seconds": time.perf_counter() - begun, "until_ready": ready}


def load(url: str, job: Job, config: JambaConfig, clients: int, ceilings: Ceilings) -> dict[str, Any]:
    """Measures how many output tokens per second the server generates for `clients` concurrent clients.

    `predicted` is the rate in tokens per second that the device's memory bandwidth and matmul rate allow for decode.
    The time of prefill is not included in `predicted`.
    """
    options = BenchOptions(
        concurrency=str(clients),
        num_prompts=max(8, 2 * clients),
        num_warmups=clients,
        input_len=INPUT_LEN,
        output_len=OUTPUT_LEN,
        vocab_size=config.vocab_size,
        max_seconds=LEVEL_SECONDS,
        seed=clients,
    )
    [level] = run_bench(url, options).levels
    policy = Format.parse(job.format).policy
    work = decode_work(config, policy, sequences=clients, context=INPUT_LEN + OUTPUT_LEN // 2)
    row: dict[str, Any] = {"kind": "http", "size": clients, "tok_s": level.output_throughput}
    row |= {"predicted": clients / work.seconds(ceilings), "bound": work.bound(ceilings)}
    row |= {"completed": level.completed, "planned": level.planned, "level": msgspec.to_builtins(level)}
    if level.ttft_ms and level.tpot_ms:
        row |= {"ttft_p50_ms": level.ttft_ms.p50, "tpot_p50_ms": level.tpot_ms.p50}
    return row
