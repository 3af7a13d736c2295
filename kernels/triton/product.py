"""The modules `linear` and `moe` share this matrix product. Its sums run over K in ascending order, in fixed tiles.

Tiles have at least 64 rows, even for one token, because the compiler uses another tensor-core instruction for fewer
rows. The empty rows cost no time where the product is memory-bound. There are two shapes of tile: many rows for
prefill, few columns for decode, so that every multiprocessor reads a part of the weight. A row has the same bits in
both shapes if the tensor cores add over K in the same order for every width of the tile. This holds for one and the
same instruction, and it must be checked on every GPU (`tests/kernels/test_triton.py` compares with `==`).

For a quantised weight the transposed tile, weight @ x.T, is computed. The weight's numbers are computed in registers,
and tensor cores can read only their first operand from registers. The tile then has at least 64 columns and as few as
16 rows.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from jamba_server.kernels.triton.launch import EXACT, dot, jit
from jamba_server.kernels.triton.quantized import GROUP, numbers

FEW_ROWS = 64
FEWER_ROWS = 16  # The number of rows of x in the smallest tile, for quantised weights only.


class Tile(NamedTuple):
    """The shape of the output tile that a program computes, and the launch options of the kernel.

    One iteration of the kernel's loop multiplies `inner` elements of each row of x.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    # The largest number of registers that a thread is allowed to use. With None, the compiler chooses this number.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Returns the tile's sizes and options as keyword arguments for the launch of a kernel."""
        return EXACT | {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def tile_for(rows: int, item_bytes: int, *, quantized: bool = False) -> Tile:
    """Returns the tile for a product with `rows` rows of x, whose elements have `item_bytes` bytes."""
    if quantized:
        return _quantized_tile(rows, item_bytes)
    inner = 128 // item_bytes
    if rows <= FEW_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=6)
    return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=3)


def _quantized_tile(rows: int, item_bytes: int) -> Tile:
    """Returns the tile for a product with a quantised weight.

    Without `max_registers` the compiler spills registers to raise the occupancy, which shared memory limits anyway.
    """
    inner, max_registers = GROUP.value, 255
    # Each float32 element needs three registers, one for each of its three TF32 products, so the tile is small. With
    # int4 weights, more than 3 pipeline stages do not fit into 99 KiB of shared memory.
    if item_bytes == 4:
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
    """Returns x @ weight.T: float32 [ROWS, COLUMNS].

    x: pointers to the first element of each row [ROWS, 1]; weight_row: int64 [1, COLUMNS], the numbers of the weight's
    rows; `weight_rows` is how many rows the weight has, and `size` is K. Only a quantised weight, whose FORMAT is not
    empty, uses `scales` and STAGES.
    """
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
    """Computes the result of the function `product` for a weight that is not quantised."""
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
    """Computes the result of the function `product` for a quantised weight.

    Inside, it computes weight @ x.T, so that the tensor cores can read the weight's numbers from registers.
    """
    words: tl.constexpr = GROUP // 8 if FORMAT == "int4" else GROUP // 4
    dtype: tl.constexpr = x.dtype.element_ty
    k, mask, scale_at = tl.arange(0, GROUP)[None, :], tl.trans(weight_mask), tl.trans(scales + weight_row)
    weight_at = tl.trans(weight + weight_row * (tl.cdiv(size, GROUP) * words)) + tl.arange(0, words)[None, :]
    x_at = x + k
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    # If the number of the loop's pipeline stages is given explicitly, the loop prefetches the scales as well as the
    # weight.
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
