"""Attention of the compiled kernels over keys and values that come from memory, as a share of its bandwidth.

    python -m benchmarks.cpu_attention [--contexts 1024,4096,16384] [--prefill] [--lib FILE]

In a decode step the weights pass through the caches between two calls; here each call reads other pages than the ones
before it, from a storage that is many times larger than the caches. Prefill is given as operations a second, two for
each multiplication of the scores and of the weighted values that causality leaves, beside those of torch's own product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpu import attention as attention_module
from kernels.cpu.attention import AttentionDecode, AttentionPrefill
from kernels.cpu.library import Library, library
from kernels.cpu.memory import huge_pages
from kernels.ops import Pages

STORAGE_BYTES = 512 << 20
BLOCK = 16
HEADS = ((20, 1, 128), (32, 8, 128), (20, 1, 64), (32, 8, 64), (8, 2, 64))  # query heads, KV heads, head size


def seconds(run: Callable[[], object], budget: float) -> float:
    """Of the median run, as many as take `budget` seconds, but at least three; one more warms up."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def read_bandwidth() -> float:
    """Bytes a second that all threads read together, from huge pages."""
    data = huge_pages(STORAGE_BYTES).view(torch.float32)
    data.fill_(1)
    return data.nbytes / seconds(data.sum, 0.5)


def matmul_rate() -> float:
    """Operations a second of torch's own product, 512 x 2560 x 8192, in bf16."""
    x, weight = torch.randn(512, 2560).bfloat16(), torch.randn(8192, 2560).bfloat16()
    return 2 * 512 * 2560 * 8192 / seconds(lambda: torch.nn.functional.linear(x, weight), 0.5)


class Storage:
    """Pages [pages, 2, BLOCK, G, Z] whose use goes round, so that none is used again while a cache may hold it."""

    def __init__(self, kv_heads: int, size: int, huge: bool) -> None:
        page_bytes = 2 * BLOCK * kv_heads * size * 2
        pages = STORAGE_BYTES // page_bytes
        memory = huge_pages(pages * page_bytes) if huge else torch.empty(pages * page_bytes, dtype=torch.uint8)
        self.kv = memory.view(torch.bfloat16).view(pages, 2, BLOCK, kv_heads, size)
        self.kv.copy_(torch.randn(BLOCK, kv_heads, size))
        self.order = torch.randperm(pages).int()

    def requests(self, sequences: int, context: int) -> Iterator[Pages]:
        need = sequences * -(-context // BLOCK)
        lens = torch.full((sequences,), context, dtype=torch.int32)
        tables = [table.view(sequences, -1) for table in self.order.split(need) if len(table) == need]
        return cycle([Pages(self.kv[:, 0], self.kv[:, 1], table, lens, context) for table in tables])


def decode(storage: Storage, heads: tuple[int, int, int], sequences: int, context: int, peak: float) -> None:
    query_heads, kv_heads, size = heads
    kernel, requests = AttentionDecode(), storage.requests(sequences, context)
    q = torch.randn(sequences, query_heads, size).bfloat16()
    taken = seconds(lambda: kernel(q, next(requests), size**-0.5), 0.15)
    rate = 2 * sequences * context * kv_heads * size * 2 / taken
    print(
        f"decode  {query_heads:3}/{kv_heads} x {size:3}  {sequences} x {context:6}  {taken * 1e6:9.0f} us  "
        f"{rate / 1e9:5.1f} GB/s  {rate / peak:4.0%}",
        flush=True,
    )


def prefill(storage: Storage, heads: tuple[int, int, int], context: int, peak: float) -> None:
    query_heads, kv_heads, size = heads
    chunk = min(512, context)
    kernel, requests = AttentionPrefill(), storage.requests(1, context)
    q, starts = torch.randn(chunk, query_heads, size).bfloat16(), torch.tensor([0, chunk], dtype=torch.int32)
    taken = seconds(lambda: kernel(q, next(requests), starts, chunk, size**-0.5), 0.3)
    operations = 4 * query_heads * size * chunk * (context - (chunk - 1) / 2)
    print(
        f"prefill {query_heads:3}/{kv_heads} x {size:3}  last {chunk} of {context:6}  {taken * 1e6:9.0f} us  "
        f"{operations / taken / 1e9:5.0f} GFLOP/s  {operations / taken / peak:4.0%}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--sequences", default="1,8")
    parser.add_argument("--small-pages", action="store_true", help="of the machine's memory: 4 KiB, not huge ones")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--heads", default="")
    parser.add_argument("--lib", type=Path, help="another build of the library")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.lib:
        other = Library(arguments.lib)
        attention_module.library = lambda: other
    torch.set_num_threads(arguments.threads)
    attention_module.library().set_threads(arguments.threads)
    bandwidth, rate = read_bandwidth(), matmul_rate()
    print(
        f"{library().level()}, {arguments.threads} threads, {bandwidth / 1e9:.1f} GB/s, {rate / 1e12:.2f} TFLOP/s"
    )
    chosen = [tuple(map(int, h.split("/"))) for h in arguments.heads.split(",") if h] or HEADS
    for heads in chosen:
        storage = Storage(heads[1], heads[2], not arguments.small_pages)
        for context in map(int, arguments.contexts.split(",")):
            for sequences in map(int, arguments.sequences.split(",")):
                decode(storage, heads, sequences, context, bandwidth)
            if not arguments.no_prefill:
                prefill(storage, heads, context, rate)


if __name__ == "__main__":
    main()
