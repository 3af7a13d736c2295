"""Measures prefill on a CPU with AVX2, and compares it with the rate of fused multiply-adds of the same minutes.

    python -m benchmarks.cpu.prefill --name prefill-avx2 [--shapes small,moe] [--format bf16] [--threads 2]

The limit is what the multiply-add units do at most: a small program in C, which needs a C compiler, measures it before
and after each prefill (`fma.c`). torch's own product in bfloat16 is no limit on such a processor, because it is ten
times slower than these units. A prompt of 512 tokens runs in steps of the default size and in one step, in turns, and
the median counts. The weights are dummies. All kernels use AVX2, whatever the processor has. The program writes
benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.cpu.engine import PREFILL_TOKENS, RESULTS
from benchmarks.http.serving import describe_commit
from benchmarks.shapes import SHAPES, Format, active_parameters, write_config
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels.cpu.library import library
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

TURNS = 5
PARAMS = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def compiled(folder: Path) -> Path:
    """Compiles the program that measures the rate of the multiply-add units, and returns its path."""
    program = folder / "fma"
    source = Path(__file__).with_name("fma.c")
    subprocess.run(["cc", "-O2", "-pthread", str(source), "-o", str(program)], check=True)
    return program


def fma_rate(program: Path, threads: int) -> float:
    """Returns the rate of the multiply-add units in operations per second."""
    return float(subprocess.run([program, str(threads)], check=True, stdout=subprocess.PIPE).stdout)


def load(shape: str, stored: Format, threads: int, tokens: int | None) -> LLM:
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        size: dict[str, Any] = {} if tokens is None else {"max_num_batched_tokens": tokens}
        settings: dict[str, Any] = {"threads": threads, "max_model_len": 1024, "max_num_seqs": 1}
        return LLM(name, load_format="dummy", **settings, **size, **stored.settings)


def seconds(llm: LLM, random: Random) -> float:
    """Returns the time in which the engine computes a prompt."""
    prompt = random.choices(range(3, llm.core.info.vocab_size), k=PREFILL_TOKENS)
    start = time.perf_counter()
    llm.generate([prompt], PARAMS)
    return time.perf_counter() - start


def measure(shape: str, stored: Format, threads: int, program: Path) -> list[str]:
    """Returns rows of the table for a shape: one for steps of the default size, and one for a single step."""
    random, lines = Random(0), list[str]()
    for tokens in (None, PREFILL_TOKENS):
        llm = load(shape, stored, threads, tokens)
        operations = 2 * active_parameters(llm.core.model_runner.model.config) * PREFILL_TOKENS
        seconds(llm, random)
        taken, rates = list[float](), [fma_rate(program, threads)]
        for _ in range(TURNS):
            taken.append(seconds(llm, random))
            rates.append(fma_rate(program, threads))
        time_taken, rate = statistics.median(taken), statistics.median(rates)
        lines.append(
            f"| {shape} | {stored.name} | {llm.core.info.max_num_batched_tokens} | "
            f"{PREFILL_TOKENS / time_taken:,.0f} | {operations / time_taken / 1e12:.3f} | "
            f"{rate / 1e12:.3f} | {operations / time_taken / rate:.0%} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--shapes", default="small,moe", help="model shapes to measure")
    parser.add_argument("--format", default="bf16", help="format of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the engine")
    options = parser.parse_args()
    stored, shapes = Format.parse(options.format), options.shapes.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        parser.error(f"Unknown shapes {', '.join(unknown)}; the known ones are {', '.join(SHAPES)}.")
    lines = [
        f"# {options.name}",
        "",
        f"Prefill of {PREFILL_TOKENS} tokens with AVX2, in process: {describe_machine().cpu}, "
        f"{options.threads} threads, {describe_versions(('torch',))}, {utc_now()}, commit {describe_commit()}. "
        f"Medians of {TURNS} turns.",
        "",
        "| shape | format | tokens in a step | tokens/s | TFLOP/s | multiply-add units, TFLOP/s | share |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    library().set_level("avx2")
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for shape in shapes:
            lines += measure(shape, stored, options.threads, program)
    (RESULTS / f"{options.name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
