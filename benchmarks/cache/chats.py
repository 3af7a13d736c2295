"""Sends the workload `multi-turn` to this server and to llama.cpp's server, with the same GGUF file."""

from __future__ import annotations

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
import torch

from benchmarks.http.serving import running_server, stop
from jamba_server.server.cli.bench.command import BenchOptions, run_bench

START_TIMEOUT = 120.0
PORT = 8428
SLOTS, SLOT_TOKENS = 2, 4096
# The checkpoint has no chat template. Both servers get this one, which is llama.cpp's default.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# More clients take turns than the server has slots, so that a chat does not find its slot as it left it.
OPTIONS = BenchOptions(
    workload="multi-turn", turns=8, input_len=60, output_len=60, num_prompts=8, num_warmups=0, concurrency="4"
)


@contextmanager
def llama_server(program: Path, gguf: Path, template: Path) -> Generator[str]:
    """Starts llama.cpp's server with its default cache in RAM and default checkpoints, and yields its URL."""
    url = f"http://127.0.0.1:{PORT}"
    threads = str(torch.get_num_threads())
    sizes = ["-np", str(SLOTS), "-c", str(SLOTS * SLOT_TOKENS), "-t", threads]
    command = [program, "-m", gguf, *sizes, "--port", str(PORT), "--chat-template-file", template]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + START_TIMEOUT
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass  # the server does not listen yet
            time.sleep(0.5)
        else:
            sys.exit(f"{program} is not ready after {START_TIMEOUT:g} s (status {process.poll()}).")
        yield url
    finally:
        stop(process)


def measure(gguf: Path, program: Path) -> dict[str, Any]:
    """Returns what `jamba bench` reports of each server."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "chatml.jinja"
        template.write_text(TEMPLATE)
        sizes = ["--max-model-len", str(SLOT_TOKENS), "--max-num-seqs", str(SLOTS)]
        arguments = [str(gguf), *sizes, "--threads", str(torch.get_num_threads()), "--chat-template", str(template)]
        found: dict[str, Any] = {"slots": SLOTS}
        with running_server(arguments, START_TIMEOUT) as (url, _):
            found["this server"] = msgspec.to_builtins(run_bench(url, OPTIONS))
        with llama_server(program, gguf, template) as url:
            found["llama.cpp"] = msgspec.to_builtins(run_bench(url, OPTIONS))
    return found
