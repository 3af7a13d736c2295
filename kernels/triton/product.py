"""The matrix product that `linear` and `moe` share: tiles of fixed shape, K in order, nothing split.

Tiles have at least 64 rows even for one token: with fewer, tensor cores are addressed by another instruction. The rows
that are not there cost no time where weights come from memory. Two shapes of tile: of many rows for prefill, of few
columns for decode, so that every multiprocessor reads a part of the weight. A row has the same bits in both as long as
the tensor cores add over K in the same order whatever the tile's width; that holds for one instruction and is to be
checked on every GPU (`tests/kernels/test_triton.py` compares with `==`).

Of a quantised weight the tile is computed the other way round, weight @ x.T: its numbers are made in registers, from
which tensor cores take their first operand only. Then its columns are the 64 at least, and its rows as few as 16.
"""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from jamba_server.kernels.triton.launch import EXACT, dot, jit
from jamba_server.kernels.triton.quantized import GROUP, numbers

FEW_ROWS = 64
FEWER_ROWS = 16  # of quantised products, whose rows are the tensor cores' columns


class Tile(NamedTuple):
    """Shape of the tile that a program computes, and how much of K it takes at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: as many as the compiler thinks best

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of a launch."""
        return EXACT | {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def tile_for(rows: int, item_bytes: int, *, quantized: bool = False) -> Tile:
    """The tile for a product of so many rows of x, whose numbers have `item_bytes`."""
    if quantized:
        return _quantized_tile(rows, item_bytes)
    inner = 128 // item_bytes
    if rows <= FEW_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=6)
    return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=3)


def _quantized_tile(rows: int, item_bytes: int) -> Tile:
    """Left to itself the compiler spills for the sake of programs that shared memory has no room for."""
    inner, max_registers = GROUP.value, 255
    if item_bytes == 4:  # float32 takes three registers for one; more stages of int4 do not fit into 99 KiB
        return Tile(FEWER_ROWS, 64, inner, num_warps=4, num_stages=3, max_registers=max_registers)
    if rows <= FEWER_ROWS:
        return Tile(FEWER_ROWS, 64, inner, num_warps=4, num_stages=6, max_registers=max_registers)
    if rows <= FEW_ROWS:
        return Tile(FEW_ROWS, 64, inner, num_warps=4, num_stages=4, max_registers=max_registers)
    return Tile(FEW_ROWS, 128, inner, num_warps=8, num_stages=3, max_registers=max_registers)


@jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    weight_row: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    weight_rows: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """x @ weight.T, float32 [ROWS, COLUMNS]. x: pointers to the first element of each row [ROWS, 1]; weight_row: int64
    [1, COLUMNS], which of the `weight_rows`; `size` is K. `scales` and STAGES are those of a weight with a FORMAT."""
    if FORMAT == "":
        total = plain_product(x, weight, weight_row, x_mask, weight_mask, size, ROWS, COLUMNS, INNER)
    else:
        total = quantized_product(
            x, weight, scales, weight_row, x_mask, weight_mask, size, weight_rows, ROWS, COLUMNS, FORMAT, STAGES
        )
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
    weight_rows: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """`product` of a packed weight. Inside it is weight @ x.T, so that the tensor cores take the weight from the
    registers in which its numbers are made."""
    words: tl.constexpr = GROUP // 8 if FORMAT == "int4" else GROUP // 4
    dtype: tl.constexpr = x.dtype.element_ty
    k, mask, scale_at = tl.arange(0, GROUP)[None, :], tl.trans(weight_mask), tl.trans(scales + weight_row)
    weight_at = tl.trans(weight + weight_row * (tl.cdiv(size, GROUP) * words)) + tl.arange(0, words)[None, :]
    x_at = x + k
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    # with a number of stages of its own, the loop fetches the scales ahead, too
    for start in tl.range(0, size, GROUP, num_stages=STAGES):
        a = numbers(tl.load(weight_at, mask=mask, other=0), FORMAT).to(dtype)
        b = tl.trans(tl.load(x_at, mask=x_mask & (k < size - start), other=0.0))
        if FORMAT == "int4":
            group = dot(a, b, tl.zeros((COLUMNS, ROWS), tl.float32))
            total = tl.fma(tl.load(scale_at, mask=mask, other=0.0), group, total)
            scale_at += weight_rows
        else:
            total = dot(a, b, total)
        x_at += GROUP
        weight_at += words
    if FORMAT != "int4":
        total *= tl.load(scale_at, mask=mask, other=0.0)
    return tl.trans(total)
