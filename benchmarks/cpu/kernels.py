"""Times the compiled CPU kernels and the reference kernels, except matrix products, at the 3B and Mini shapes.

    python -m benchmarks.cpu.kernels --threads 2

The shortest of several runs counts. If attention decode reads more than the CPU's caches hold, its rate is also given
as a share of the bandwidth at which torch sums the same tensor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.ops import Pages, SampleInputs, ScanInputs, ScanWeights, Segments, StateSaves
from jamba_server.kernels.table import implementations

# Sizes of the 3B model: hidden size, number of Mamba channels, SSM state entries per channel, vocabulary size.
H, D, S, V = 2560, 5120, 16, 65536
CACHE_BYTES = 64 << 20
# The sizes of attention: (number of query heads, number of KV heads, head size).
HEADS = {"3B": (20, 1, 128), "Mini": (32, 8, 128)}


def best_of(run: Callable[[], object], times: int) -> float:
    """Calls the function `run` once to warm up, then `times` times. Returns the shortest call's time in seconds."""
    run()
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def compare(label: str, op: str, run: Callable[[Any], object]) -> float:
    """Times the reference kernel and the compiled kernel of the operation `op`, and prints the two times.

    Returns the compiled kernel's time in seconds.
    """
    seconds = {
        entry.name: best_of(partial(run, entry.load()), 30 if entry.name == "cpu" else 3)
        for entry in implementations(op, "cpu")
    }
    ratio = seconds["reference"] / seconds["cpu"]
    print(
        f"{label:46} {seconds['cpu'] * 1e6:10.0f} us   reference {seconds['reference'] * 1e6:10.0f} us   {ratio:5.1f} x"
    )
    return seconds["cpu"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows(tokens: int) -> None:
    x, weight = random(tokens, H), random(H)
    compare(f"rms_norm with residual, {tokens} rows", "rms_norm", lambda kernel: kernel(x, weight, 1e-6, x))


def decode_recurrence(sequences: int) -> None:
    sizes = (D, D, S, S, D)
    inputs = ScanInputs(*(random(sequences, size) for size in sizes))
    weights = ScanWeights(-torch.rand(D, S), torch.rand(D), torch.rand(D))
    ssm, conv = torch.zeros(sequences, D, S), torch.zeros(sequences, 3, D, dtype=torch.bfloat16)
    ids, filters = ints(*range(sequences)), random(4, D)
    label = f"{sequences} sequences"
    compare(
        f"causal_conv1d_update, {label}",
        "causal_conv1d_update",
        lambda kernel: kernel(inputs.u, filters, None, conv, ids),
    )
    compare(
        f"selective_state_update, {label}",
        "selective_state_update",
        lambda kernel: kernel(inputs, weights, ssm, ids),
    )


def prefill_recurrence(tokens: int) -> None:
    inputs = ScanInputs(*(random(tokens, size) for size in (D, D, S, S, D)))
    weights = ScanWeights(-torch.rand(D, S), torch.rand(D), torch.rand(D))
    ssm, conv, filters = torch.zeros(1, D, S), torch.zeros(1, 3, D, dtype=torch.bfloat16), random(4, D)
    saves = StateSaves(ints(0, 0), ints(), ints())
    segments = Segments(ints(0, tokens), tokens, ints(0), torch.tensor([True]), saves)
    label = f"{tokens} tokens"
    compare(f"causal_conv1d, {label}", "causal_conv1d", lambda kernel: kernel(inputs.u, filters, None, conv, segments))
    compare(f"selective_scan, {label}", "selective_scan", lambda kernel: kernel(inputs, weights, ssm, segments))


def attention(shape: str, sequences: int, context: int) -> None:
    heads, kv_heads, size = HEADS[shape]
    blocks = context // 16
    storage = random(sequences * blocks, 2, 16, kv_heads, size)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks).int()
    pages = Pages(storage[:, 0], storage[:, 1], tables, ints(*[context] * sequences), context)
    q = random(sequences, heads, size)
    label = f"attention_decode {shape}, {sequences} x {context} keys"
    seconds = compare(label, "attention_decode", lambda kernel: kernel(q, pages, size**-0.5))
    read, floats = storage.numel() * storage.element_size(), storage.view(torch.float32)
    if read > CACHE_BYTES:
        peak = read / best_of(lambda: floats.sum(), 10)
        print(f"    {read / seconds / 1e9:.1f} GB/s of KV, {read / seconds / peak:.0%} of {peak / 1e9:.1f} GB/s")
    chunk = min(512, context)
    q, starts = random(sequences * chunk, heads, size), torch.arange(sequences + 1, dtype=torch.int32) * chunk
    if sequences == 1:
        compare(
            f"attention_prefill {shape}, last {chunk} of {context}",
            "attention_prefill",
            lambda kernel: kernel(q, pages, starts, chunk, size**-0.5),
        )


def sampling(sequences: int) -> None:
    logits = torch.randn(sequences, V) * 3
    ones, keys = torch.ones(sequences), torch.arange(sequences) * 77_777_777_777
    inputs = SampleInputs(ones, ones, torch.zeros(sequences), ones.int() * 0, keys)
    compare(f"sample at temperature 1, {sequences} rows", "sample", lambda kernel: kernel(logits, inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    threads: int = parser.parse_args().threads
    torch.set_num_threads(threads)
    library().set_threads(threads)
    print(f"{library().level()}, {threads} threads")
    for tokens in (1, 8, 512):
        rows(tokens)
    for sequences in (1, 8, 32):
        decode_recurrence(sequences)
    prefill_recurrence(512)
    for shape in HEADS:
        for sequences, context in ((1, 1024), (1, 8192), (8, 2048)):
            attention(shape, sequences, context)
    for sequences in (1, 8):
        sampling(sequences)


if __name__ == "__main__":
    main()
