"""Measures how many seconds Triton takes to compile the kernels of whole models, once with a single thread and once
with one thread per core.

    python -m benchmarks.gpu.rehearsal [--name triton-rehearsal] [--target 90]

An engine compiles its kernels while its weights load (`engine.start.rehearsal`). This program does the same without a
GPU: Triton compiles the kernels, but nothing is loaded or run. Each run has an empty cache and a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import jamba_server.kernels.table
from benchmarks.shapes import Format, write_config
from jamba_server.engine.config import KvCacheDtype
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.start.memory import DummySteps
from jamba_server.engine.start.rehearsal import Rehearsal
from jamba_server.server.cli.bench import conditions

RESULTS = Path(__file__).parents[1] / "results"
STEPS: Final = DummySteps(max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=262144, block_size=16)
MODELS: Final[Mapping[str, tuple[str, str, KvCacheDtype]]] = {
    "3b": ("3b", "bf16", "auto"),
    "3b, int8, fp8 pages": ("3b", "int8", "fp8"),
    "mini, int8": ("mini", "int8", "auto"),
}


class NoGpu:
    """Replaces Triton's driver on a machine without a GPU, and tells Triton for which GPU to compile."""

    launcher_cls = staticmethod(lambda *_: None)

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, 32)
        properties = {"max_shared_mem": 1 << 20}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: properties
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def rehearsal_of(model: str) -> Rehearsal:
    """Returns an object that compiles the Triton kernels of the model `model`, a key of MODELS, as an engine does when
    it starts."""
    shape, format, kv_cache_dtype = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        config = load_model_config(Path(folder))
    with mock.patch.object(jamba_server.kernels.table, "ensure_available"):
        chosen = jamba_server.kernels.table.select("cuda", {"all": "triton"})
    layout = cache_layout(config, block_size=STEPS.block_size, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
    return Rehearsal(config, chosen, Format.parse(format).policy, torch.bfloat16, layout)


def compile_once(model: str, threads: int, target: int) -> tuple[int, float]:
    """Compiles the kernels of a model. Returns the number of kernels and the seconds that the compilation took.

    Imports are not part of the time, because an engine has made them before it begins to compile.
    """
    driver.set_active(NoGpu(target))  # pyright: ignore[reportArgumentType]
    rehearsal = rehearsal_of(model)
    rehearsal.runner()
    gpu = mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(target, 10))
    with gpu, ThreadPoolExecutor(threads) as executor:
        started = time.perf_counter()
        count = rehearsal.compile(STEPS, executor)
        return count, time.perf_counter() - started


def measured(model: str, threads: int, target: int) -> tuple[int, float]:
    """Runs the function `compile_once` in a new process with an empty kernel cache, and returns the function's
    result."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", __spec__.name, "--once", model, "--threads", str(threads)]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        result = subprocess.run(
            [*command, "--target", str(target)], env=environment, check=True, capture_output=True, text=True
        )
    count, seconds = result.stdout.split()
    return int(count), float(seconds)


def report(target: int) -> str:
    machine = conditions.describe_machine()
    threads = [1, machine.cores]
    lines = [
        "Kernels that an engine compiles while its weights load, and how many seconds that takes: triton "
        f"{triton.__version__}, sm_{target}, nothing compiled before, nothing loaded meanwhile. {machine.cpu}, "
        f"{machine.cores} cores.",
        "",
        f"| model | kernels | {' | '.join(f'{number} threads, s' for number in threads)} |",
        f"| --- | ---: |{' ---: |' * len(threads)}",
    ]
    for model in MODELS:
        found: list[Any] = [measured(model, n, target) for n in threads]
        lines.append(f"| {model} | {found[0][0]} | {' | '.join(f'{seconds:.1f}' for _, seconds in found)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="write the results to benchmarks/results/NAME.md")
    parser.add_argument("--target", type=int, default=90, help="compute capability to compile for, times ten")
    parser.add_argument("--once", choices=MODELS, help="compile one model in this process; print kernels and seconds")
    parser.add_argument("--threads", type=int, default=1, help="number of compiling threads for --once")
    arguments = parser.parse_args()
    if arguments.once:
        print(*compile_once(arguments.once, arguments.threads, arguments.target))
        return
    text = report(arguments.target)
    print(text)
    if arguments.name:
        (RESULTS / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{text}")


if __name__ == "__main__":
    main()
