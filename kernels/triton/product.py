"""The modules `linear` and `moe` share this matrix product. Its sums run over K in ascending order, in fixed tiles.

Tiles have at least 64 rows, even for one token, because the compiler uses another tensor-core instruction for fewer
rows. The empty rows cost no time where the product is memory-bound. There are several shapes of tile: many rows for
prefill, few columns for decode, so that every multiprocessor reads a part of the weight. A row has the same bits in
all shapes if the tensor cores add over K in the same order for every width of the tile. This holds for one and the
same instruction, and it must be checked on every GPU (`tests/kernels/test_triton.py` compares with `==`).

For a quantised weight the transposed tile, weight @ x.T, is computed. The weight's numbers are computed in registers,
and tensor cores can read only their first operand from registers. The tile then has at least 64 columns and as few as
16 rows. With more rows, each number that is computed serves more of them.

Programs that run at the same time should read the same parts of x and of the weight, so that most of these reads are
served by the L2 cache. The function `tile_of` therefore numbers the tiles in groups of GROUP tiles of rows: within a
group, all its tiles of rows are computed for one tile of columns before the next tile of columns.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from jamba_server.kernels.triton.formats import chunk_of, group_of, has, kind_of, part_of
from jamba_server.kernels.triton.launch import EXACT, capability, cdiv, dot, jit
from jamba_server.kernels.triton.quantized import SUPER, factors, numbers

FEW_ROWS = 64
FEWER_ROWS = 16  # The number of rows of x in the smallest tile, for quantised weights only.
GROUP = 16  # The number of tiles of rows in a group, which the function `tile_of` explains.
# The number of programs from which on a product of many rows uses the widest tile: three for each of about 130
# multiprocessors. With fewer programs, the last ones would leave too many multiprocessors idle.
WIDE_PROGRAMS = 400
ENOUGH_PROGRAMS = 264  # Two programs for each multiprocessor.


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


def tile_for(rows: int, item_bytes: int, format: str = "", columns: int = 0) -> Tile:
    """Returns the tile for a product with `rows` rows of x, whose elements have `item_bytes` bytes.

    `format` is the weight's format, or "" if the weight is not quantised. `columns` is the number of columns of the
    result, of all weights that are multiplied at the same time. With 0, the widest tile is not chosen.
    """
    if format:
        return _quantized_tile(rows, item_bytes, format, columns)
    inner = 128 // item_bytes
    # Each program reads all of its rows of x, so narrow tiles read x too often unless there are few rows or columns.
    if rows <= FEWER_ROWS or (rows <= FEW_ROWS and 0 < columns <= ENOUGH_PROGRAMS // 4 * 64):
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=6)
    if rows <= FEW_ROWS:
        return Tile(rows=64, columns=64, inner=inner, num_warps=4, num_stages=4)
    # A wider tile reads fewer bytes for each operation. Other GPUs have too little shared memory for it.
    if capability()[0] in (9, 10) and item_bytes == 2 and cdiv(rows, 128) * cdiv(columns, 256) >= WIDE_PROGRAMS:
        return Tile(rows=128, columns=256, inner=inner, num_warps=8, num_stages=3)
    return Tile(rows=128, columns=128, inner=inner, num_warps=8, num_stages=3)


def _quantized_tile(rows: int, item_bytes: int, format: str, columns: int) -> Tile:
    """Returns the tile for a product with a quantised weight.

    Without `max_registers` the compiler spills registers to raise the occupancy, which shared memory limits anyway.
    """
    inner, max_registers = chunk_of(format), 255
    # Each float32 element needs three registers, one for each of its three TF32 products, so the tile is small. With
    # int4 weights, more than 3 pipeline stages do not fit into 99 KiB of shared memory.
    if item_bytes == 4:
        return Tile(FEWER_ROWS, 64, inner, num_warps=4, num_stages=3, max_registers=max_registers)
    if rows <= FEWER_ROWS:
        return Tile(FEWER_ROWS, 64, inner, num_warps=4, num_stages=6, max_registers=max_registers)
    # The sums of several groups, and what is computed for each of them, need more registers.
    heavy = has(format, "offsets") or has(format, "zeros") or kind_of(format) == "table"
    most = FEW_ROWS // 2 if heavy and 0 < group_of(format) < inner else FEW_ROWS
    if rows <= FEW_ROWS:
        small = most if rows > FEW_ROWS // 2 else FEW_ROWS // 2
        if cdiv(columns, 128) >= ENOUGH_PROGRAMS:  # such as the experts of a layer
            return Tile(small, 128, inner, num_warps=8, num_stages=3, max_registers=max_registers)
        return Tile(small, 64, inner, num_warps=4, num_stages=4, max_registers=max_registers)
    # Twice as many rows halve the work of computing the weight's numbers. Where a row has one scale, the sums of a
    # group need no registers of their own.
    if capability()[0] in (9, 10) and group_of(format) == 0:
        most = 128
    return Tile(most, 128, inner, num_warps=8, num_stages=3, max_registers=max_registers)


@jit
def tile_of(
    program: tl.tensor, row_tiles: tl.tensor, column_tiles: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Returns the numbers of the tile of rows and of the tile of columns that a program computes.

    The grid has row_tiles * column_tiles programs, in groups of GROUP tiles of rows. Within a group, programs with
    consecutive numbers have the same columns.
    """
    in_group = GROUP * column_tiles
    first, number = program // in_group * GROUP, program % in_group
    size = tl.minimum(row_tiles - first, GROUP)
    return first + number % size, number // size


@jit
def product(
    x: tl.tensor,
    weight: tl.tuple,
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

    x: pointers to the first element of each row [ROWS, 1]; weight: the tensors of a PackedWeight; weight_row: int64
    [1, COLUMNS], the numbers of the weight's rows; `weight_rows` is how many rows the weight has, and `size` is K. Only
    a quantised weight, whose FORMAT is not empty, uses STAGES.
    """
    if FORMAT == "":
        total = plain_product(x, weight[0], weight_row, x_mask, weight_mask, size, ROWS, COLUMNS, INNER)
    else:
        total = quantized_product(
            x, weight, weight_row, x_mask, weight_mask, 0, size, size, weight_rows, ROWS, COLUMNS, FORMAT, STAGES
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
    x: tl.tensor, weight: tl.tuple, weight_row: tl.tensor, x_mask: tl.tensor, weight_mask: tl.tensor, start: tl.tensor,
    end: tl.tensor, inputs: tl.tensor, weight_rows: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Computes the result of the function `product` for a quantised weight with K = `inputs`, over the inputs from
    `start` to `end` - 1. `start` is a multiple of 256.

    Inside, it computes weight @ x.T, so that the tensor cores can read the weight's numbers from registers. The sum of
    x over a group, which offsets are multiplied by, is a product with ones, so it has one order of summation too.
    """
    inner: tl.constexpr = part_of(FORMAT)
    chunk: tl.constexpr = chunk_of(FORMAT)
    parts: tl.constexpr = chunk // inner
    whole: tl.constexpr = group_of(FORMAT) == 0  # A row has one scale.
    # The number of parts that share a scale. All of them are in one chunk, unless the whole row has one scale.
    each: tl.constexpr = parts if whole else group_of(FORMAT) // inner
    offsets: tl.constexpr = has(FORMAT, "offsets")
    level: tl.constexpr = 2 if offsets else 1  # `scales` has a scale and perhaps an offset for each group.
    words, scales, supers, zeros, table = weight
    dtype: tl.constexpr = x.dtype.element_ty
    row, mask, k = tl.trans(weight_row), tl.trans(weight_mask), tl.arange(0, inner)[None, :]
    stride = tl.full((1, 1), 1, tl.int64) * weight_rows
    words_at = words + row * (tl.cdiv(inputs, chunk) * (inner // 2)) + tl.arange(0, inner // 2)[None, :]
    words_at += start // chunk * (inner // 2)
    scale_at, zero_at, x_at = scales + row, zeros + row, x + start + k
    if not whole:
        scale_at += start // chunk * (parts // each * level) * stride
        zero_at += start // chunk * (parts // each) * stride
    none = tl.zeros((COLUMNS, ROWS), tl.float32)
    total = none
    # An explicit number of pipeline stages makes the loop prefetch the scales as well as the weight.
    for at in tl.range(start, end, chunk, num_stages=STAGES):
        packed = tl.load(words_at, mask=mask, other=0)
        super_at = supers + at // SUPER * level * stride + row
        for part in tl.static_range(parts):
            b = tl.trans(tl.load(x_at + part * inner, mask=x_mask & (k < end - at - part * inner), other=0.0))
            zero = tl.load(zero_at + part // each * stride, mask=mask, other=0) if has(FORMAT, "zeros") else mask
            a = numbers(packed, zero, table, part, FORMAT, dtype)
            if whole:
                total = dot(a, b, total)
            else:
                group = dot(a, b, none if part % each == 0 else group)  # noqa: F821
                if offsets:
                    ones = tl.full((COLUMNS, inner), 1.0, tl.float32).to(dtype)
                    sums = dot(ones, b, none if part % each == 0 else sums)  # noqa: F821
                if part % each == each - 1:
                    group_at = scale_at + part // each * level * stride
                    total = tl.fma(factors(group_at, super_at, mask, FORMAT), group, total)
                    if offsets:
                        offset = factors(group_at + stride, super_at + stride, mask, FORMAT)
                        total = tl.fma(offset, sums, total)
        x_at += chunk
        words_at += inner // 2
        if not whole:
            scale_at += parts // each * level * stride
            zero_at += parts // each * stride
    if whole:
        total *= factors(scale_at, scale_at, mask, FORMAT)
    return tl.trans(total)
