"""The matrix product that `linear` and `moe` share: tiles of fixed shape, K in order, nothing split.

Tiles have at least 64 rows even for one token: with fewer, tensor cores are addressed by another instruction. The rows
that are not there cost no time where weights come from memory. Two shapes of tile: of many rows for prefill, of few
columns for decode, so that every multiprocessor reads a part of the weight. A row has the same bits in both as long as
the tensor cores add over K in the same order whatever the tile's width; that holds for one instruction and is to be
checked on every GPU (`tests/kernels/test_linear.py` compares with `==`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from kernels.triton.launch import dot, jit

FEW_ROWS = 64


class Tile(NamedTuple):
    """Shape of the tile that a program computes, and how much of K it takes at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tile_for(rows: int, item_bytes: int) -> Tile:
    """The tile for a product of so many rows."""
    inner = 128 // item_bytes
    if rows <= FEW_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=6)
    return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=3)


@jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> tl.tensor:
    """x @ weight.T, float32 [ROWS, COLUMNS]. x: pointers to the first element of each row [ROWS, 1]; weight: the same
    of each of its rows [1, COLUMNS]; `size` is K."""
    k = tl.arange(0, INNER)
    x_at, weight_at = x + k[None, :], weight + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, INNER):
        inside = k < size - start
        a = tl.load(x_at, mask=x_mask & inside[None, :], other=0.0)
        b = tl.load(weight_at, mask=weight_mask & inside[:, None], other=0.0)
        total = dot(a, b, total)
        x_at += INNER
        weight_at += INNER
    return total
