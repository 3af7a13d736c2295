"""These kernels multiply by a weight with few rows, such as Mamba's x_proj and out_proj. They split K into sections.

With ordinary tiles, few programs would read such a weight: less than one for each multiprocessor, and a program alone
cannot have enough bytes under way to use its share of the memory bandwidth. Therefore K is split into sections of fixed
length, and the sums of the sections are added in order. If x has many rows, one program computes all sections of its
tile. If x has few rows, each section has its own program, and a second kernel adds the sums that these programs have
written to memory. Both ways give the same bits.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.triton.launch import EXACT, cdiv, dot, follow, jit, rounded
from jamba_server.kernels.triton.product import GROUP, Tile, quantized_product, tile_of
from jamba_server.kernels.triton.product import tile_for as product_tile
from jamba_server.kernels.triton.quantized import PackedWeight

SECTION = 512  # The number of elements of a section of K, if the weight has very few rows.
# A weight with more rows than this has enough tiles, and K is not split. Fewer inputs than LEAST_INPUTS are not worth
# a split, because a section would be a few steps of a program only.
MOST_OUTPUTS, LEAST_INPUTS = 4096, 4096
# The number of programs that sections shall give, in tiles of 64 columns, and the largest number of sections.
PROGRAMS, MOST_SECTIONS = 160, 8
UNIT = 256  # Sections begin at multiples of this number of inputs, as the function `quantized_product` demands.
# If x has at least this number of rows, one program computes a tile over all sections of K. With fewer rows there would
# be too few such programs to fill the GPU, so a separate program computes each section of each tile. The first number
# is for weights with very few rows, the second for others.
MANY_ROWS, MANY_ROWS_WIDE = 1024, 512
SUM_BLOCK = 1024


def is_narrow(outputs: int, inputs: int) -> bool:
    """Returns whether a weight [outputs, inputs] has very few rows."""
    return 8 * outputs <= inputs


def section_of(outputs: int, inputs: int) -> int:
    """Returns the number of inputs in a section of K for a weight [outputs, inputs], or 0 if K is not split.

    This depends on the weight's shape alone, so that all products with the weight have the same order of summation.
    """
    if is_narrow(outputs, inputs):
        return SECTION
    if outputs > MOST_OUTPUTS or inputs < LEAST_INPUTS:
        return 0
    sections = min(MOST_SECTIONS, cdiv(PROGRAMS, cdiv(outputs, 64)))
    return cdiv(cdiv(inputs, sections), UNIT) * UNIT


def tile_for(rows: int, item_bytes: int, format: str = "") -> Tile:
    """Returns the tile for a product with `rows` rows of x and a weight with very few rows.

    The tile for a weight that is not quantised has at least 64 rows.
    """
    if format:
        return product_tile(rows, item_bytes, format)
    inner = 128 // item_bytes
    # On GPUs of compute capability 12.0, the compiler spills registers of this smaller tile without `max_registers`.
    if rows < MANY_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=4, max_registers=255)
    return Tile(rows=128, columns=64, inner=inner, num_warps=8, num_stages=4)


def wide_tile_for(rows: int, item_bytes: int, format: str = "") -> Tile:
    """Returns the tile for a product with `rows` rows of x and a weight that has more rows."""
    return product_tile(rows, item_bytes, format)


def sectioned_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Writes x @ weight.T + bias to `out` [T, N], whose rows may be parts of wider rows."""
    rows, outputs = out.shape
    narrow = is_narrow(outputs, weight.inputs)
    if rows < (MANY_ROWS if narrow else MANY_ROWS_WIDE):
        sums = section_sums(x, weight)
        grid = (cdiv(out.numel(), SUM_BLOCK),)
        bias_or_any, sizes = sums if bias is None else bias, (out.numel(), outputs, len(sums), out.stride(0))
        sum_kernel[grid](sums, bias_or_any, out, *sizes, HAS_BIAS=bias is not None, BLOCK=SUM_BLOCK)
        return
    tile = (tile_for if narrow else wide_tile_for)(rows, x.element_size(), weight.format)
    bias_or_any, sizes = weight.words if bias is None else bias, (rows, outputs, weight.inputs)
    all_sections_kernel[(cdiv(rows, tile.rows) * cdiv(outputs, tile.columns),)](
        *(x, *weight.tensors, bias_or_any, out, *sizes, x.stride(0), out.stride(0)),
        HAS_BIAS=bias is not None,
        GROUP=GROUP,
        **_options(weight, outputs, tile),
    )


def section_sums(x: Tensor, weight: PackedWeight) -> Tensor:
    """Returns the part of x @ weight.T that each section of K contributes: float32 [sections, T, N]."""
    (rows, inputs), outputs = x.shape, len(weight.words)
    fits = weight.inputs == inputs and x.stride(1) == 1 and (bool(weight.format) or x.dtype == weight.words.dtype)
    require(fits, "x", x, "have the weight's dtype and as many inputs, in contiguous rows")
    sums = torch.empty(cdiv(inputs, section_of(outputs, inputs)), rows, outputs, device=x.device)
    narrow = is_narrow(outputs, inputs)
    tile = (tile_for if narrow else wide_tile_for)(min(rows, MANY_ROWS - 1), x.element_size(), weight.format)
    section_kernel[(cdiv(rows, tile.rows), cdiv(outputs, tile.columns), len(sums))](
        *(x, *weight.tensors, sums, rows, outputs, inputs, x.stride(0)), **_options(weight, outputs, tile)
    )
    return sums


def _options(weight: PackedWeight, outputs: int, tile: Tile) -> dict[str, Any]:
    """Returns the keyword arguments of a launch that depend on the weight and on its tile."""
    section = section_of(outputs, weight.inputs)
    return {"SECTION": section, "FORMAT": weight.format, "STAGES": tile.num_stages} | tile.options | EXACT


@jit(do_not_specialize=["rows"])
def section_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Writes one section's part of one tile. The grid is (cdiv(rows, ROWS), cdiv(outputs, COLUMNS), sections)."""
    follow()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x_at, weight = x + row.to(tl.int64) * x_stride, (words, scales, supers, zeros, table)
    masks, start = (row < rows, column < outputs), tl.program_id(2) * SECTION
    total = section(x_at, weight, column, masks, start, inputs, outputs, SECTION, ROWS, COLUMNS, INNER, FORMAT, STAGES)
    at = sums + (tl.program_id(2).to(tl.int64) * rows + row) * outputs + column
    tl.store(at, total, mask=(row < rows) & (column < outputs))


@jit(do_not_specialize=["rows"])
def all_sections_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Computes one tile over all sections. The grid is (cdiv(rows, ROWS) * cdiv(outputs, COLUMNS))."""
    follow()
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x_at, weight = x + row.to(tl.int64) * x_stride, (words, scales, supers, zeros, table)
    masks, total = (row < rows, column < outputs), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, SECTION):
        total += section(
            x_at, weight, column, masks, start, inputs, outputs, SECTION, ROWS, COLUMNS, INNER, FORMAT, STAGES
        )
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
    at = out + row.to(tl.int64) * out_stride + column
    tl.store(at, rounded(total, out.type.element_ty), mask=(row < rows) & (column < outputs))


@jit
def section(
    x: tl.tensor,
    weight: tl.tuple,
    column: tl.tensor,
    masks: tl.tuple,
    start: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """Returns the part of x @ weight.T that the section from `start` on contributes: float32 [ROWS, COLUMNS].

    x: pointers to the first input of each row [ROWS, 1]; weight: the tensors of a PackedWeight; masks: which rows and
    which columns there are.
    """
    size, place = tl.minimum(inputs - start, SECTION), column.to(tl.int64)
    if FORMAT == "":
        weight_at = weight[0] + place * inputs + start
        total = section_product(x + start, weight_at, masks[0], masks[1], size, ROWS, COLUMNS, INNER)
    else:
        end = start + size
        total = quantized_product(
            x, weight, place, masks[0], masks[1], start, end, inputs, outputs, ROWS, COLUMNS, FORMAT, STAGES
        )
    return total


@jit
def section_product(
    x: tl.tensor,
    weight: tl.tensor,
    x_mask: tl.tensor,
    weight_mask: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> tl.tensor:
    """Returns the part of x @ weight.T that one section of `size` inputs contributes: float32 [ROWS, COLUMNS].

    x: pointers to the first input of each row [ROWS, 1]; weight: pointers to the first input of each row of the weight
    [1, COLUMNS].
    """
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


@jit(do_not_specialize=["size"])
def sum_kernel(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    outputs: tl.tensor,
    sections: tl.tensor,
    out_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds the parts of all sections, and the bias. The grid is (cdiv(size, BLOCK)), where `size` is out.numel().

    Neighbouring rows of `out` are `out_stride` apart.
    """
    follow()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = add_sections(sums + at, at < size, sections, size)
    if HAS_BIAS:
        total += tl.load(bias + at % outputs, mask=at < size, other=0.0).to(tl.float32)
    place = out + at // outputs * out_stride + at % outputs
    tl.store(place, rounded(total, out.type.element_ty), mask=at < size)


@jit
def add_sections(sums: tl.tensor, mask: tl.tensor, sections: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Adds the parts of all sections in ascending order. The pointers `sums` point to the first section's parts."""
    total = tl.load(sums, mask=mask, other=0.0)
    for _ in range(1, sections):
        sums += stride
        total += tl.load(sums, mask=mask, other=0.0)
    return total
