"""Times the matrix product of `kernels.cpu` for each weight format, and torch's `F.linear` for comparison.

    python -m benchmarks.cpu.products --dtype bfloat16 --threads 2

Each contender (torch or a weight format) uses several weights in turn, which together exceed the CPU's caches. So each
product reads its weight from memory, as in a step of a model. GB/s counts the bytes of the stored weights with their
scales. The contenders take turns of SECONDS seconds, so that the idle threads of the previous contender have gone to
sleep. Each contender's time in a turn is the median of its calls. Printed are the median over all turns, and the median
ratio of the times of torch and of a format in the same turn, from which slow changes of the machine's speed drop out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.engine.quantization import FORMATS
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.kernels.cpu.library import LEVELS, library
from jamba_server.kernels.cpu.linear import Linear, PackedWeight
from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.server.cli.bench.conditions import uncached_size

ROWS = (1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 32, 48, 64, 128, 256, 512, 1024, 2048)
ROTATED_BYTES = max(250_000_000, uncached_size() // 2)
# For each number of rows, torch and each weight format are timed in TURNS turns of SECONDS seconds each.
TURNS, SECONDS = 7, 0.12


def times_of_turns(contenders: Sequence[Sequence[Callable[[], Tensor]]]) -> list[list[float]]:
    """Returns for each list of `contenders` the median time of a call in seconds, turn by turn.

    The calls of a list use different weights, so that the CPU's caches do not hold the weights of the next call.
    """
    found: list[list[float]] = [[] for _ in contenders]
    for _ in range(TURNS):
        for calls, turns in zip(contenders, found, strict=True):
            times: list[float] = []
            end = time.perf_counter() + SECONDS
            for call in cycle(calls):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
                if time.perf_counter() > end and len(times) > 2:
                    break
            turns.append(median(times))
    return found


def rotated(weight: Tensor | QuantizedWeight, linear: Linear) -> list[PackedWeight]:
    """Returns at least two copies of a packed weight, with a total size of about ROTATED_BYTES."""
    first = linear.packer(weight)
    return [first, *(linear.packer(weight) for _ in range(max(1, ROTATED_BYTES // first.panels.numel())))]


def compare(outputs: int, inputs: int, dtype: torch.dtype, rows: Sequence[int], formats: Sequence[str]) -> None:
    """Times the product of activations [rows, inputs] with a weight [outputs, inputs], for each number of rows.

    Prints one line for each number of rows and each weight format.
    """
    linear, dense = Linear(), torch.randn(outputs, inputs, dtype=dtype)
    packed = {
        str(dtype).removeprefix("torch."): rotated(dense, linear),
        **{name: rotated(quantize(torch.randn(outputs, inputs), name), linear) for name in FORMATS if name in formats},
    }
    plain = [dense.clone() for _ in range(max(2, ROTATED_BYTES // (dense.numel() * dtype.itemsize)))]
    print(f"{'rows':>6} {'weights':>9} {'ms':>9} {'GB/s':>6} {'TFLOP/s':>8} {'times torch':>12}")
    for m in rows:
        x = torch.randn(m, inputs, dtype=dtype)
        theirs = [lambda x=x, w=w: F.linear(x, w) for w in plain]
        ours = [[lambda x=x, w=w: linear(x, w) for w in weights] for weights in packed.values()]
        other, *own = times_of_turns([theirs, *ours])
        for (name, weights), turns in zip(packed.items(), own, strict=True):
            seconds, ratio = median(turns), median(a / b for a, b in zip(other, turns, strict=True))
            gigabytes, tera = weights[0].panels.numel() / 1e9, 2 * m * outputs * inputs / 1e12
            print(
                f"{m:6} {name:>9} {seconds * 1e3:9.3f} {gigabytes / seconds:6.1f} {tera / seconds:8.3f} {ratio:12.2f}"
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
    parser.add_argument(
        "--formats",
        nargs="+",
        default=tuple(FORMATS),
        choices=tuple(FORMATS),
        help="formats of weights to compare with --dtype",
    )
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
    compare(options.outputs, options.inputs, getattr(torch, options.dtype), options.rows, options.formats)


if __name__ == "__main__":
    main()
