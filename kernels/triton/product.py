"""The matrix product that `linear` and `moe` share: tiles of fixed shape, K in order, nothing split.

Tiles have at least 64 rows even for one token: with fewer, tensor cores are addressed by another instruction. The rows
that are not there cost no time where weights come from memory. Two shapes of tile: of many rows for prefill, of few
columns for decode, so that every multiprocessor reads a part of the weight. A row has the same bits in both as long as
the tensor cores add over K in the same order whatever the tile's width; that holds for one instruction and is to be
checked on every GPU (`tests/kernels/test_linear.py` compares with `==`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from kernels.triton.launch import EXACT, dot, jit
from kernels.triton.quantized import GROUP, numbers

FEW_ROWS = 64


class Tile(NamedTuple):
    """Shape of the tile that a program computes, and how much of K it takes at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of a launch."""
        return EXACT | {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tile_for(rows: int, item_bytes: int, *, quantized: bool = False) -> Tile:
    """The tile for a product of so many rows."""
    if quantized:
        inner = 256 // item_bytes
        if rows <= 16:
            return Tile(rows=16, columns=64, inner=inner, num_warps=4, num_stages=6)
        if rows <= FEW_ROWS:
            return Tile(rows=64, columns=64, inner=inner, num_warps=4, num_stages=4)
        return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=2)
    inner = 128 // item_bytes
    if rows <= FEW_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=6)
    return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=3)


@jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    weight_row: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """x @ weight.T, float32 [ROWS, COLUMNS]. x: pointers to the first element of each row [ROWS, 1]; weight_row: int64
    [1, COLUMNS], which rows of the weight; `size` is K. `scales` belong to a weight with a FORMAT, another than ""."""
    if FORMAT == "":
        total = plain_product(x, weight, weight_row, x_mask, weight_mask, size, ROWS, COLUMNS, INNER)
    else:
        total = quantized_product(x, weight, scales, weight_row, x_mask, weight_mask, size, ROWS, COLUMNS, FORMAT)
    return total


@jit
def plain_product(
    x: tl.tensor,
    weight: tl.tensor,
    weight_row: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> tl.tensor:
    """`product` of floats."""
    k = tl.arange(0, INNER)
    x_at, weight_at = x + k[None, :], weight + weight_row * size + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, INNER):
        inside = k < size - start
        a = tl.load(x_at, mask=x_mask & inside[None, :], other=0.0)
        b = tl.load(weight_at, mask=weight_mask & inside[:, None], other=0.0)
        total = dot(a, b, total)
        x_at += INNER
        weight_at += INNER
    return total


@jit
def quantized_product(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    weight_row: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """`product` of a packed weight, group after group: the other way round, weight @ x.T, so that its numbers go to the
    tensor cores from the registers in which they are made."""
    BITS: tl.constexpr = 4 if FORMAT == "int4" else 8
    PARTS: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = GROUP * BITS // 32
    SIZE: tl.constexpr = GROUP // PARTS
    groups = tl.cdiv(size, GROUP)
    scale_at = tl.trans(scales + weight_row * (groups if FORMAT == "int4" else 1))
    weight_at = tl.trans(weight + weight_row * (groups * WORDS)) + tl.arange(0, WORDS)[None, :]
    k, mask = tl.arange(0, SIZE)[None, :], tl.trans(weight_mask)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    x_at = x + k
    dtype: tl.constexpr = x.dtype.element_ty
    for start in range(0, size, GROUP):
        words = tl.load(weight_at, mask=mask, other=0)
        if FORMAT == "int4":
            scale = tl.load(scale_at, mask=mask, other=0.0)
            part = tl.zeros((COLUMNS, ROWS), tl.float32)
        else:
            part = total
        for i in tl.static_range(PARTS):
            b = tl.load(x_at + i * SIZE, mask=x_mask & (k < size - start - i * SIZE), other=0.0)
            part = dot(numbers(words, i, FORMAT).to(dtype), tl.trans(b), part)
        if FORMAT == "int4":
            total = tl.fma(scale, part, total)
            scale_at += 1
        else:
            total = part
        x_at += GROUP
        weight_at += WORDS
    if FORMAT != "int4":
        total *= tl.load(scale_at, mask=mask, other=0.0)
    return tl.trans(total)
