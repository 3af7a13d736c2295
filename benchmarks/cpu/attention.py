"""Times the compiled attention kernels and compares their speed with the memory bandwidth and the matmul rate.

    python -m benchmarks.cpu.attention [--contexts 1024,4096,16384] [--sequences 1,8] [--in-order]

In a real decode step the weights pass through the CPU's caches between two calls of attention, so the keys and values
come from memory. Here each call reads other pages than the calls before it, from a storage many times larger than the
caches. The pages lie in random order, which is the worst case after long use of the engine, or with --in-order one
after the other, as in a fresh engine. If 20 query heads share one KV head, attention is compute-bound; the share of
the matmul rate is then the one to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import cycle

import torch

from benchmarks.shapes import matmul_rate, median_seconds, read_bandwidth
from jamba_server.kernels.cpu.attention import AttentionDecode, AttentionPrefill
from jamba_server.kernels.cpu.library import LEVELS, library
from jamba_server.kernels.ops import Pages

STORAGE_BYTES = 512 << 20
BLOCK, CHUNK = 16, 512
SECONDS = 0.15  # The number of seconds for which each measurement calls a kernel repeatedly.
# The attention shapes to measure, each as (number of query heads, number of KV heads, head size).
HEADS = ((20, 1, 128), (32, 8, 128), (20, 1, 64), (32, 8, 64), (8, 2, 64))


class Storage:
    """Random keys and values in pages of BLOCK tokens: a tensor [pages, 2, BLOCK, KV heads, head size].

    Calls use the pages in turn, so a page is used again only after the CPU's caches have dropped it.
    """

    def __init__(self, kv_heads: int, size: int, in_order: bool) -> None:
        pages = STORAGE_BYTES // (2 * BLOCK * kv_heads * size * 2)
        self.kv = torch.empty(pages, 2, BLOCK, kv_heads, size, dtype=torch.bfloat16)
        self.kv.copy_(torch.randn(BLOCK, kv_heads, size))
        self.order = (torch.arange(pages) if in_order else torch.randperm(pages)).int()

    def requests(self, sequences: int, context: int) -> Iterator[Pages]:
        need = sequences * -(-context // BLOCK)
        lens = torch.full((sequences,), context, dtype=torch.int32)
        tables = [table.view(sequences, -1) for table in self.order.split(need) if len(table) == need]
        return cycle([Pages(self.kv[:, 0], self.kv[:, 1], table, lens, context) for table in tables])


def show(label: str, seconds: float, moved: float, operations: float, peaks: tuple[float, float]) -> None:
    reads, rate = moved / seconds, operations / seconds
    print(
        f"{label:34} {seconds * 1e6:9.0f} us  {reads / 1e9:5.1f} GB/s {reads / peaks[0]:4.0%}  "
        f"{rate / 1e9:5.0f} GFLOP/s {rate / peaks[1]:4.0%}",
        flush=True,
    )


def decode(
    storage: Storage, heads: tuple[int, int, int], sequences: int, context: int, peaks: tuple[float, float]
) -> None:
    query_heads, kv_heads, size = heads
    kernel, requests = AttentionDecode(), storage.requests(sequences, context)
    q = torch.randn(sequences, query_heads, size).bfloat16()
    seconds = median_seconds(lambda: kernel(q, next(requests), size**-0.5), SECONDS)
    keys = sequences * context
    label = f"decode {query_heads}/{kv_heads} x {size}, {sequences} x {context}"
    show(label, seconds, keys * 2 * kv_heads * size * 2, keys * 4 * query_heads * size, peaks)


def prefill(storage: Storage, heads: tuple[int, int, int], context: int, peaks: tuple[float, float]) -> None:
    query_heads, kv_heads, size = heads
    rows = min(CHUNK, context)
    kernel, requests = AttentionPrefill(), storage.requests(1, context)
    q, starts = torch.randn(rows, query_heads, size).bfloat16(), torch.tensor([0, rows], dtype=torch.int32)
    seconds = median_seconds(lambda: kernel(q, next(requests), starts, rows, size**-0.5), SECONDS)
    pairs = rows * (context - (rows - 1) / 2)  # The number of (query, key) pairs that the causal mask admits.
    label = f"prefill {query_heads}/{kv_heads} x {size}, last {rows} of {context}"
    show(label, seconds, context * 2 * kv_heads * size * 2, pairs * 4 * query_heads * size, peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument("--contexts", default="1024,4096,16384", help="lengths of the sequences, in tokens")
    parser.add_argument("--sequences", default="1,8", help="numbers of sequences in a decode step")
    parser.add_argument("--in-order", action="store_true", help="store a sequence's pages one after the other")
    parser.add_argument("--level", choices=LEVELS, help="instruction set to use instead of the best available one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library().set_threads(arguments.threads)
    if arguments.level:
        library().set_level(arguments.level)
    peaks = read_bandwidth(), matmul_rate()
    print(f"{library().level()}, {arguments.threads} threads, {peaks[0] / 1e9:.1f} GB/s, {peaks[1] / 1e12:.2f} TFLOP/s")
    for heads in HEADS:
        storage = Storage(heads[1], heads[2], arguments.in_order)
        for context in map(int, arguments.contexts.split(",")):
            for sequences in map(int, arguments.sequences.split(",")):
                decode(storage, heads, sequences, context, peaks)
            prefill(storage, heads, context, peaks)


if __name__ == "__main__":
    main()
