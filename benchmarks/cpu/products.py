"""Times the matrix product of `kernels.cpu` for each weight format, and torch's `F.linear` for comparison.

    python -m benchmarks.cpu.products --dtype bfloat16 --threads 2

Each contender (torch or a weight format) uses several weights in turn, which together exceed the CPU's caches. So each
product reads its weight from memory, as in a step of a model. GB/s counts the bytes of the stored weights with their
scales. The contenders take turns of SECONDS seconds, so that the idle threads of the previous contender have gone to
sleep. The shortest time is printed, because other load on the machine changes it less than the mean.
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

from jamba_server.engine.quantization import FORMATS
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.kernels.cpu.library import LEVELS, library
from jamba_server.kernels.cpu.linear import Linear, PackedWeight
from jamba_server.kernels.ops import Weight
from jamba_server.server.cli.bench.conditions import uncached_size

ROWS = (1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048)
ROTATED_BYTES = max(250_000_000, uncached_size() // 2)
# For each number of rows, torch and each weight format are timed in TURNS turns of SECONDS seconds each.
TURNS, SECONDS = 5, 0.12


def best_times(contenders: Sequence[Sequence[Callable[[], Tensor]]]) -> list[float]:
    """Returns the time in seconds of the fastest call in each list of `contenders`.

    The calls of a list use different weights, so that the CPU's caches do not hold the weights of the next call.
    """
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


def rotated(weight: Weight, linear: Linear) -> list[PackedWeight]:
    """Returns at least two copies of a packed weight, with a total size of about ROTATED_BYTES."""
    first = linear.pack(weight)
    return [first, *(linear.pack(weight) for _ in range(max(1, ROTATED_BYTES // first.panels.numel())))]


def compare(outputs: int, inputs: int, dtype: torch.dtype, rows: Sequence[int]) -> None:
    """Times the product of activations [rows, inputs] with a weight [outputs, inputs], for each number of rows.

    Prints one line for each number of rows and each weight format.
    """
    linear, dense = Linear(), torch.randn(outputs, inputs, dtype=dtype)
    packed = {
        str(dtype).removeprefix("torch."): rotated(dense, linear),
        **{name: rotated(quantize(torch.randn(outputs, inputs), name), linear) for name in FORMATS},
    }
    plain = [dense.clone() for _ in range(max(2, ROTATED_BYTES // (dense.numel() * dtype.itemsize)))]
    print(f"{'rows':>6} {'weights':>9} {'ms':>9} {'GB/s':>6} {'TFLOP/s':>8} {'times torch':>12}")
    for m in rows:
        x = torch.randn(m, inputs, dtype=dtype)
        theirs = [lambda x=x, w=w: F.linear(x, w) for w in plain]
        ours = [[lambda x=x, w=w: linear(x, w) for w in weights] for weights in packed.values()]
        other, *own = best_times([theirs, *ours])
        for (name, weights), seconds in zip(packed.items(), own, strict=True):
            gigabytes, tera = weights[0].panels.numel() / 1e9, 2 * m * outputs * inputs / 1e12
            print(
                f"{m:6} {name:>9} {seconds * 1e3:9.3f} {gigabytes / seconds:6.1f} {tera / seconds:8.3f} "
                f"{other / seconds:12.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="type of the activations"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--outputs", type=int, default=8192, help="number of rows of the weight")
    parser.add_argument("--inputs", type=int, default=2560, help="number of columns of the weight")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows of the activations")
    parser.add_argument("--level", choices=LEVELS, help="instruction set to use instead of the best available one")
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
