"""Times matrix products with 8-bit activations beside those with activations of the model's dtype.

    python -m benchmarks.cpu.activation_products --name activation-products --levels avx2 avx512_bf16

Each contender uses several copies of a weight in turn, which together exceed the CPU's caches. So each product reads
its weight from memory, as in a step of a model. The contenders take turns. A turn's time is the median of its calls,
and a ratio is the median over all turns of the ratio within a turn, because the speed of a machine that others use
changes from second to second. The program writes benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.cpu.engine import RESULTS
from benchmarks.http.serving import describe_commit
from jamba_server.engine.gguf.blocks import TYPES
from jamba_server.engine.gguf.stored import format_of
from jamba_server.engine.quantization import FORMATS, Format
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.engine.quantization.stored import empty
from jamba_server.kernels.cpu import a8
from jamba_server.kernels.cpu.library import LEVELS, library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

ROWS = (1, 4, 8, 16, 64, 256)
NAMES = ("int4", "int4-g32", "int8", "Q8_0", "Q6_K")
"""The formats of the weights: options of this server, and types of GGUF files."""
ALL_FORMATS: Mapping[str, Format] = {**FORMATS, **{kind.name: format_of(kind) for kind in TYPES.values()}}
COPIES_BYTES = 200_000_000
TURNS, SECONDS = 9, 0.1

Call = Callable[[Tensor], Tensor]


def calls(level: str, shape: tuple[int, int]) -> dict[tuple[str, str], list[Call]]:
    """Returns the products to time: by the format of the weight and the format of the activations, a list of products
    with different copies of the weight."""
    library().set_level(level)
    plain, products = Linear(), {}
    for name in NAMES:
        weight = random_weight(name, shape)
        for kind, linear in (("none", plain), ("int8", a8.Linear(plain))):
            copies = [linear.pack(weight) for _ in range(1 + COPIES_BYTES // ALL_FORMATS[name].num_bytes(*shape))]
            products[name, kind] = [lambda x, linear=linear, w=w: linear(x, w) for w in copies]
    return products


def random_weight(name: str, shape: tuple[int, int]) -> QuantizedWeight:
    """Returns a weight with random numbers and scales in one of the formats of ALL_FORMATS."""
    if name in FORMATS:
        return quantize(torch.randn(*shape), next(known for known in FORMATS if known == name))
    weight = empty(ALL_FORMATS[name], shape, torch.device("cpu"))
    weight.values.random_(-ALL_FORMATS[name].limit, ALL_FORMATS[name].limit + 1)
    for factors in (weight.scales, weight.super_scales):
        if factors is not None:
            factors.copy_(torch.randint(1, 30, factors.shape))
    return weight


def turn_times(contenders: Sequence[Sequence[Call]], x: Tensor) -> list[list[float]]:
    """Returns the median time in seconds of a call, for each contender and turn."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(TURNS):
        for i, products in enumerate(contenders):
            found, end = list[float](), time.perf_counter() + SECONDS
            for product in cycle(products):
                begin = time.perf_counter()
                product(x)
                found.append(time.perf_counter() - begin)
                if time.perf_counter() > end:
                    break
            times[i].append(statistics.median(found))
    return times


def table(level: str, shape: tuple[int, int]) -> str:
    """Returns a table with the times of each number of rows."""
    products = calls(level, shape)
    header = [f"{name}: none (ms) | int8 (ms) | ratio" for name in NAMES]
    lines = [
        f"| rows | {' | '.join(header)} | int4 none / int4-g32 int8 |",
        "| ---: |" + " ---: |" * (3 * len(NAMES) + 1),
    ]
    for rows in ROWS:
        times = dict(zip(products, turn_times(list(products.values()), random_rows(rows, shape)), strict=True))
        cells = [str(rows)]
        for name in NAMES:
            plain, rounded = times[name, "none"], times[name, "int8"]
            cells += [f"{statistics.median(t) * 1e3:.3f}" for t in (plain, rounded)] + [ratio(plain, rounded)]
        cells.append(ratio(times["int4", "none"], times["int4-g32", "int8"]))
        lines.append(f"| {' | '.join(cells)} |")
        print(level, lines[-1], flush=True)
    return "\n".join(lines)


def random_rows(rows: int, shape: tuple[int, int]) -> Tensor:
    return torch.randn(rows, shape[1], dtype=torch.bfloat16)


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["avx2"], help="instruction sets to measure")
    parser.add_argument("--outputs", type=int, default=8192, help="number of rows of the weight")
    parser.add_argument("--inputs", type=int, default=2560, help="number of columns of the weight")
    arguments = parser.parse_args()
    shape = arguments.outputs, arguments.inputs
    versions = ", ".join(f"{name} {version}" for name, version in describe_versions(["torch"]).items())
    text = (
        f"# {arguments.name}\n\nProducts of bfloat16 activations with weights of {shape[0]} x {shape[1]}, with "
        "activations in bfloat16 (none) and in 8 bits (int8), for each number of rows of the activations. A ratio is "
        "the median of the ratios within a turn, and above 1 if 8-bit activations are faster. "
        f"{torch.get_num_threads()} threads, {describe_machine().cpu}, {versions}, {utc_now()}, commit "
        f"{describe_commit()}.\n"
    )
    for level in arguments.levels:
        found = table(level, shape)
        text += f"\nLevel {level}, 8-bit products for {a8.units_of(level)}:\n\n{found}\n"
    (RESULTS / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
