"""Times matrix products, and decoding, with several numbers of threads in turn.

    python -m benchmarks.cpu.threads --name threads [--threads 1,2,3,64,192] [--shape small] [--sequences 1,8]

More threads than processors are slower than as many, but should not be much slower. The products have bfloat16 weights
of [outputs, inputs], which stay in the processor's caches where they are small. The numbers of threads take turns, and
each cell is the median of all calls. A few calls are slower because a worker's turn ends. A median does not show them,
so one row has the largest ratio of mean times. The last row has the smallest number of ranges of pieces that any of the
threads has taken in all products of the table, so it shows whether each thread has had work. One thread takes no
ranges, because it runs each product as a whole. The second table has the same products while every thread that a
product has pieces for takes one, although no processor is free for it; this is the mode of the tests of exactness. The
program writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from operator import add
from pathlib import Path
from random import Random
from typing import Final

import torch

from benchmarks.cpu.engine import RESULTS
from benchmarks.shapes import write_config
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.llm import LLM
from jamba_server.server.cli.bench import conditions

# Outputs, inputs and rows of the products.
PRODUCTS: Final = ((256, 256, 1), (1024, 512, 1), (1024, 512, 32), (5120, 2560, 1), (8192, 2560, 8), (8192, 2560, 256))
TURNS, SECONDS = 4, 0.25  # SECONDS is long enough for a turn of each of 191 workers, in the second product
STEPS, WARM_UP = 30, 8


def time_product(
    outputs: int, inputs: int, rows: int, threads: Sequence[int], ranges: Sequence[list[int]]
) -> list[list[float]]:
    """Returns the times in seconds of the calls of a product, for each number of threads. Adds to `ranges`, for each
    number of threads, how many ranges of pieces each thread has taken."""
    native, linear = library(), Linear()
    packed = linear.pack(torch.randn(outputs, inputs).bfloat16())
    x, taken = torch.randn(rows, inputs).bfloat16(), [list[float]() for _ in threads]
    for _ in range(TURNS):
        for i, count in enumerate(threads):
            native.set_threads(count)
            end = time.perf_counter() + SECONDS
            while time.perf_counter() < end:
                start = time.perf_counter()
                linear(x, packed)
                taken[i].append(time.perf_counter() - start)
            ranges[i][:] = map(add, ranges[i], native.pieces_taken(count))
    return taken


def product_table(name: str, threads: Sequence[int]) -> list[str]:
    """Returns the lines of a table of all products."""
    ranges, slowest = [[0] * count for count in threads], [0.0] * len(threads)
    lines = head(f"{name}: us a product (ratio)", threads)
    for outputs, inputs, rows in PRODUCTS:
        taken = time_product(outputs, inputs, rows, threads, ranges)
        times, means = [*map(statistics.median, taken)], [*map(statistics.mean, taken)]
        slowest = [max(ratio, mean / means[1]) for ratio, mean in zip(slowest, means, strict=True)]
        lines.append(row(f"{outputs} x {inputs}, {rows} row{'s' * (rows > 1)}", times, times[1]))
        print(lines[-1], flush=True)
    lines.append("| largest ratio of mean times | " + " | ".join(f"{ratio:.2f}" for ratio in slowest) + " |")
    fewest = " | ".join(f"{min(counts):,}" if len(counts) > 1 else "-" for counts in ranges)
    return [*lines, f"| ranges taken by the thread that took fewest | {fewest} |", ""]


def time_steps(shape: str, sequences: int, threads: Sequence[int]) -> list[float]:
    """Returns the median time in seconds of a decode step of a model with dummy weights, for each number of threads."""
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        llm = LLM(Path(name), load_format="dummy", max_model_len=1024, max_num_seqs=64)
    params, random = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True), Random(0)
    prompts = [[random.randrange(3, 30_000) for _ in range(4)] for _ in range(sequences)]
    llm.core.inbox.submit([Request(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts)])
    taken = [list[float]() for _ in threads]
    for _ in range(3):
        for i, count in enumerate(threads):
            library().set_threads(count)
            for step in range(WARM_UP + STEPS):
                start = time.perf_counter()
                llm.core.step()
                if step >= WARM_UP:
                    taken[i].append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def head(name: str, threads: Sequence[int]) -> list[str]:
    """Returns the first two lines of a table with a column for each number of threads."""
    columns = " | ".join(f"{count} threads" for count in threads)
    return [f"| {name} | {columns} |", "| --- " + "| ---: " * len(threads) + "|"]


def row(name: str, times: Sequence[float], reference: float) -> str:
    """Returns a line of a table: each time in microseconds, and its ratio to the time `reference`."""
    return f"| {name} | " + " | ".join(f"{1e6 * t:,.0f} ({t / reference:.2f})" for t in times) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--threads", default="1,2,3,64,192", help="numbers of threads; ratios are to the second one")
    parser.add_argument("--shape", default="small", help="model shape whose decode steps are timed")
    parser.add_argument("--sequences", default="1,8", help="numbers of sequences that decode at the same time")
    options = parser.parse_args(arguments)
    threads, native = [int(count) for count in options.threads.split(",")], library()
    lines = [f"# {options.name}", "", f"bfloat16, {conditions.describe_machine().cpu}, {conditions.utc_now()}.", ""]
    for together in (False, True):
        native.set_together(together)
        name = "every thread takes a piece" if together else "usual"
        lines += product_table(name, threads)
    native.set_together(False)
    lines += head(f"usual: us a decode step of `{options.shape}`", threads)
    for count in map(int, options.sequences.split(",")):
        times = time_steps(options.shape, count, threads)
        lines.append(row(f"{count} sequence{'s' * (count > 1)}", times, times[1]))
    text = "\n".join([*lines, ""])
    print(text)
    (RESULTS / f"{options.name}.md").write_text(text)


if __name__ == "__main__":
    main()
