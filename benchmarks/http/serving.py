"""Starts `jamba serve` on a free loopback port, measures its speed with 1, 8 and 32 clients and saves the results.

    python -m benchmarks.http.serving --name tiny-cpu --peer transformers -- MODEL --dtype float32

The arguments after `--` are passed to the command `jamba serve`. The server and the load generator run on this machine.
With --peer, transformers is measured after the server has stopped. The results are benchmarks/results/NAME.json and
NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress

from jamba_server.server.cli.bench import report
from jamba_server.server.cli.bench.client import Reply
from jamba_server.server.cli.bench.command import Bench, BenchOptions, open_http, run_bench
from jamba_server.server.cli.bench.conditions import describe_versions
from jamba_server.server.cli.bench.discovery import discover
from jamba_server.server.cli.bench.runner import ClosedLoop

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# A server gets the signal SIGTERM, and then SIGKILL if it still runs after this number of seconds. After SIGTERM, the
# server waits for its running requests, but for a shorter time than this.
STOP_SECONDS = 60
LOG_TAIL = 3000  # The number of characters from the end of the server's log that an error message shows.


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of this program, and the arguments of `jamba serve`, which follow the argument `--`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument(
        "--peer", choices=["transformers"], help="also time transformers' generate, one request at a time"
    )
    parser.add_argument("--concurrency", default="1,8,32", help="numbers of clients to measure")
    parser.add_argument("--num-prompts", type=int, help="requests in each measurement (default: as in jamba bench)")
    parser.add_argument("--input-len", type=int, default=256, help="tokens in each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens in each reply")
    parser.add_argument("--max-seconds", type=float, default=300.0, help="time limit of each measurement, in seconds")
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, help="seconds within which the server must be ready"
    )
    return parser.parse_args(arguments[:split]), list(arguments[split + 1 :])


@contextmanager
def running_server(
    serve_arguments: list[str], start_timeout: float, prefix: Sequence[str] = ()
) -> Generator[tuple[str, IO[str]]]:
    """Starts a server, and yields its URL and log when the server is ready. Stops the server when the context ends.

    `prefix` is put before the server's command line. It is a program that runs the command which follows, for example
    under a limit.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # The server and this program share the position in the log file, and seek() moves this position. In mode "a", the
    # server still writes at the end of the file.
    with tempfile.TemporaryFile("a+") as log:
        arguments = ["-m", "jamba_server", "serve", *serve_arguments, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            [*prefix, sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(process, url, log, start_timeout)
            yield url, log
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # The server does not listen on its port yet, so the loop tries again.
        time.sleep(0.2)
    ended = "is not ready" if process.poll() is None else f"ended with status {process.returncode}"
    log.seek(0)
    sys.exit(f"{log.read()[-LOG_TAIL:]}\nThe server {ended} after at most {timeout:g} s; the end of its log is above.")


def announcement(log: IO[str]) -> list[str]:
    """Returns the lines about model, memory, limits and kernels that the server logged at its start."""
    log.seek(0)
    found = (re.search(r": ((model|memory|limits|kernels|sampling) {2,}.*)", line) for line in log)
    return [match[1].rstrip() for match in found if match]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def flag(serve_arguments: list[str], name: str, default: str) -> str:
    """Returns the value of the option `name` in `serve_arguments`, or `default` if the option is absent."""
    for argument, following in pairwise([*serve_arguments, ""]):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return default


async def draw_prompts(url: str, options: BenchOptions) -> list[dict[str, Any]]:
    """Generates the random requests of the first measurement again, so that transformers gets the same requests."""
    async with open_http(url, None) as http:
        bench = Bench(http, options)
        tokens = await bench.token_range((await discover(http, options.model)).model)
        return [msgspec.to_builtins(turn) for session in bench.sessions(tokens, 0) for turn in session.turns]


def measure_transformers(
    requests: list[dict[str, Any]], serve_arguments: list[str], max_seconds: float
) -> tuple[dict[str, Any], report.Level]:
    """Times transformers' `generate` with the same requests, checkpoint, device, dtype and threads as the server.

    Returns the conditions and the results.
    """
    named = bool(serve_arguments) and not serve_arguments[0].startswith("-")
    job = {
        "model": serve_arguments[0] if named else str(ROOT / "server" / "demo"),
        "device": flag(serve_arguments, "--device", "auto"),
        "dtype": flag(serve_arguments, "--dtype", "auto"),
        "load_format": flag(serve_arguments, "--load-format", "auto"),
        "threads": int(flag(serve_arguments, "--threads", "0")),
        "requests": [requests[0], *requests],  # The program peer_transformers.py does not time its first request.
        "max_seconds": max_seconds,
    }
    script = Path(__file__).with_name("peer_transformers.py")
    result = subprocess.run([sys.executable, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"{script.name} ended with status {result.returncode}.")
    answer = json.loads(result.stdout)
    replies = msgspec.convert(answer["records"], list[Reply])
    return answer["conditions"], report.summarize(report.Plan(ClosedLoop(1), len(requests)), replies)


def describe_commit(root: Path = ROOT) -> str:
    """Returns the commit of a checkout, with the suffix "-dirty" if there are uncommitted changes."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(git, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def to_markdown(name: str, conditions: dict[str, Any], columns: dict[str, report.Level]) -> str:
    levels = list(columns.values())
    machine = "{cpu}, {cores} cores, {memory_gib} GiB".format(**conditions["client_machine"])
    command = " ".join(["jamba serve", *conditions["serve_arguments"]])
    versions = ", ".join(f"{package} {number}" for package, number in conditions["server_packages"].items())
    gpu = f", {conditions['gpu']}" if conditions["gpu"] else ""
    lines = [
        f"# {name}",
        "",
        f"`{command}`, {conditions['date']}, commit {conditions['commit']}.",
        f"{machine}{gpu}; {conditions['client_machine']['system']}; {versions}.",
        f"Server and load generator on this machine. Workload: {json.dumps(conditions['workload'])}.",
        "",
        "```",
        *conditions["server"],
        "```",
        "",
        f"| | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {row} | {' | '.join(values)} |" for row, values in report.rows(levels)),
        "",
        *(f"- {note}" for note in report.notes(levels)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def describe_gpu() -> str | None:
    """Returns the names and driver versions of the GPUs, or None if nvidia-smi is not installed."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return "; ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")).strip("; ")


def main() -> None:
    flags, serve_arguments = parse_arguments(sys.argv[1:])
    options = BenchOptions(
        concurrency=flags.concurrency,
        num_prompts=flags.num_prompts,
        max_seconds=flags.max_seconds,
        input_len=flags.input_len,
        output_len=flags.output_len,
    )
    with (
        running_server(serve_arguments, flags.start_timeout) as (url, log),
        Progress(console=Console(stderr=True)) as progress,
    ):
        result = run_bench(url, options, progress)
        server = announcement(log)
        requests = asyncio.run(draw_prompts(url, options)) if flags.peer else []
    conditions = result.conditions | {
        "commit": describe_commit(),
        "serve_arguments": serve_arguments,
        "server": server,
        "server_packages": describe_versions(("torch", "fastapi", "uvicorn", "tokenizers")),
        "gpu": describe_gpu(),
    }
    columns = {str(level.load): level for level in result.levels}
    if flags.peer:
        conditions["transformers"], columns["transformers, one at a time"] = measure_transformers(
            requests, serve_arguments, flags.max_seconds
        )
    RESULTS.mkdir(exist_ok=True)
    content = {"conditions": conditions, "measurements": msgspec.to_builtins(columns)}
    (RESULTS / f"{flags.name}.json").write_text(json.dumps(content, indent=2) + "\n")
    markdown = to_markdown(flags.name, conditions, columns)
    (RESULTS / f"{flags.name}.md").write_text(markdown)
    sys.stdout.write(markdown)
    if not all(level.completed for level in columns.values()):
        sys.exit("A measurement without a completed request: see the notes.")


if __name__ == "__main__":
    main()
