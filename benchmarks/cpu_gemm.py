"""The matrix product of `kernels.cpu` beside torch's `F.linear`: the best time of many, in ms, for each number of rows.

    python -m benchmarks.cpu_gemm --dtype bfloat16 --threads 2

Both go over weights that together exceed the cache, so that each product reads its weights from memory as a step of a
model does. They take turns of a tenth of a second, in which the threads of the other have gone to sleep. Other load on
the machine shows less in a best time than in a mean; it is printed for that reason.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import LEVELS, library
from kernels.cpu.linear import Linear

ROWS = (1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048)
ROTATED_BYTES = 250_000_000
TURNS, SECONDS = 5, 0.12  # for each number of rows and each of the two


def best_times(contenders: Sequence[Sequence[Callable[[], Tensor]]]) -> list[float]:
    """The shortest time in seconds of each contender, who has one call for each of the weights."""
    best = [float("inf")] * len(contenders)
    for _ in range(TURNS):
        for i, calls in enumerate(contenders):
            end = time.perf_counter() + SECONDS
            for call in cycle(calls):
                begin = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - begin)
                if time.perf_counter() > end:
                    break
    return best


def compare(outputs: int, inputs: int, dtype: torch.dtype, rows: Sequence[int]) -> None:
    """Prints one line for each number of rows."""
    copies = max(2, ROTATED_BYTES // (outputs * inputs * dtype.itemsize))
    weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(copies)]
    linear = Linear()
    packed = [linear.pack(weight) for weight in weights]
    gigabytes = outputs * inputs * dtype.itemsize / 1e9
    print(f"{'rows':>6} {'ours':>9} {'torch':>9} {'ratio':>6} {'GB/s':>6} {'TFLOP/s':>8}")
    for m in rows:
        x = torch.randn(m, inputs, dtype=dtype)
        ours = [lambda x=x, w=w: linear(x, w) for w in packed]
        theirs = [lambda x=x, w=w: F.linear(x, w) for w in weights]
        own, other = best_times([ours, theirs])
        tera = 2 * m * outputs * inputs / own / 1e12
        print(f"{m:6} {own * 1e3:9.3f} {other * 1e3:9.3f} {other / own:6.2f} {gigabytes / own:6.1f} {tera:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--outputs", type=int, default=8192, help="rows of the weight")
    parser.add_argument("--inputs", type=int, default=2560, help="columns of the weight")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x")
    parser.add_argument("--level", choices=LEVELS, help="use the code for older processors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library().set_threads(options.threads)
    if options.level:
        library().set_level(options.level)
    print(
        f"{options.outputs} x {options.inputs} {options.dtype}, {options.threads} threads, {library().level()}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    compare(options.outputs, options.inputs, getattr(torch, options.dtype), options.rows)


if __name__ == "__main__":
    main()
