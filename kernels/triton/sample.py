"""Sampling from the whole vocabulary: three passes over a row, many programs each, no temporaries of its size.

The noise is that of `kernels/reference/sample.py` in float32, which differs by about 1e-6.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.ops import SampleInputs
from kernels.reference.sample import sample as sample_by_ranking
from kernels.triton.launch import cdiv, jit, next_power_of_2

BLOCK = 4096


def sample(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """See `kernels.ops.Sample`. Rows with top_k or top_p go to the reference, for they need a ranking: to know whether
    there are any, the host waits for the device."""
    rows, size = logits.shape
    assert logits.stride(1) == 1
    blocks = cdiv(size, BLOCK)
    best, scores = (logits.new_empty(rows, blocks) for _ in range(2))
    ids = logits.new_empty(rows, blocks, dtype=torch.int32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    many = next_power_of_2(blocks)
    best_kernel[(rows, blocks)](logits, best, size, logits.stride(0), BLOCK=BLOCK)
    least = inputs.min_p.log()
    draw_kernel[(rows, blocks)](
        logits, best, inputs.temperature, least, inputs.keys, scores, ids, size, logits.stride(0), BLOCK, many
    )
    first_kernel[(rows,)](scores, ids, tokens, blocks, BLOCK=many)
    ranked = ((inputs.top_k > 0) | (inputs.top_p < 1)) & (inputs.temperature > 0)
    chosen = ranked.nonzero().squeeze(-1)
    if len(chosen) > 0:
        tokens[chosen] = sample_by_ranking(logits[chosen], SampleInputs(*(field[chosen] for field in inputs)))
    return tokens


@jit
def best_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows, blocks). best [rows, blocks]: the largest logit of each block."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + i, mask=i < size, other=float("-inf"))
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(x, axis=0))


@jit
def draw_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    least: tl.tensor,
    keys: tl.tensor,
    scores: tl.tensor,
    ids: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Grid (rows, blocks). scores, ids [rows, blocks]: each block's winner; `least` is log(min_p)."""
    row, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    i, block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    x = tl.load(logits + row * row_stride + i, mask=i < size, other=float("-inf"))
    heat = tl.load(temperature + row)
    score = x
    if heat > 0:
        # relative to the best token, so that no temperature overflows
        top = tl.max(tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf")), axis=0)
        score = (x - tl.maximum(top, -3.4e38)) / heat
        noisy = score + gumbel_noise(tl.load(keys + row), i)
        score = tl.where(score < tl.load(least + row), float("-inf"), noisy)
    tl.store(scores + row * blocks + tl.program_id(1), tl.max(score, axis=0))
    winner = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(ids + row * blocks + tl.program_id(1), winner + tl.program_id(1) * BLOCK)


@jit
def first_kernel(
    scores: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows). The first of the best blocks' winner."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(scores + row * blocks + block, mask=block < blocks, other=float("-inf"))
    winner = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(tokens + row, tl.load(ids + row * blocks + winner).to(tl.int64))


@jit
def gumbel_noise(key: tl.tensor, i: tl.tensor) -> tl.tensor:
    """-log(-log u), with u from output number i of SplitMix64 seeded with `key`."""
    bits = (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64, bitcast=True)
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    number = ((bits ^ (bits >> 31)) >> 12).to(tl.int64)
    other = (1 << 52) - 1 - number
    # above 1/2 from its end, where the tail needs the digits
    end = (tl.minimum(number, other).to(tl.float32) + 0.5) * 2.0**-52
    # log(1 - end) = log(v) + (1 - end - v) / v for v = 1 - end as rounded
    v = 1.0 - end
    upper = tl.log(v) + ((1.0 - v) - end) / v
    return -tl.log(-tl.where(number < other, tl.log(end), upper))
