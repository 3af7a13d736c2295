"""This kernel chooses the experts of each token. A program computes softmax and top-k for several tokens."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.triton.launch import cdiv, follow, jit, next_power_of_2

PROGRAM_ELEMENTS = 1024


def route_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Implements the protocol `RouteExperts`, which is documented in the module `kernels.ops`."""
    rows, experts = logits.shape
    block = next_power_of_2(experts)
    block_rows = max(1, PROGRAM_ELEMENTS // block)
    weights = logits.new_empty(rows, top_k, dtype=torch.float32)
    ids = logits.new_empty(rows, top_k, dtype=torch.int32)
    route_kernel[(cdiv(rows, block_rows),)](
        logits, weights, ids, rows, logits.stride(0), EXPERTS=experts, TOP_K=top_k, ROWS=block_rows, BLOCK=block
    )
    return weights, ids


@jit(do_not_specialize=["rows"])
def route_kernel(
    logits: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Chooses the experts of ROWS tokens. The grid is (cdiv(rows, ROWS))."""
    follow()
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (expert < EXPERTS)
    x = tl.load(logits + row.to(tl.int64)[:, None] * row_stride + expert, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(expert < EXPERTS, x, float("-inf"))
    exponentials = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    exponential_sum = tl.sum(exponentials, axis=1)
    for rank in tl.static_range(TOP_K):
        best = tl.argmax(x, axis=1, tie_break_left=True)
        chosen = expert == best[:, None]
        weight = tl.div_rn(tl.sum(tl.where(chosen, exponentials, 0.0), axis=1), exponential_sum)
        tl.store(weights + row.to(tl.int64) * TOP_K + rank, weight, mask=row < rows)
        tl.store(ids + row.to(tl.int64) * TOP_K + rank, best, mask=row < rows)
        x = tl.where(chosen, float("-inf"), x)
