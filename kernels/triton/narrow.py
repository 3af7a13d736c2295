"""These kernels multiply by a weight with few but long rows, such as Mamba's x_proj. They split K into sections.

With ordinary tiles, only a few programs would read such a weight while most of the GPU would be idle. Therefore K is
split into sections of fixed length, and the sums of the sections are added in order. If x has many rows, one program
computes all sections of its tile. If x has few rows, each section has its own program, and a second kernel adds the
sums that these programs have written to memory. Both ways give the same bits.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.triton.launch import EXACT, cdiv, dot, jit, rounded
from jamba_server.kernels.triton.product import Tile

SECTION = 512  # The number of elements in a section of K, the summed dimension of the product.
# If x has at least this number of rows, one program computes a tile over all sections of K. With fewer rows there would
# be too few such programs to fill the GPU, so a separate program computes each section of each tile.
MANY_ROWS = 1024
SUM_BLOCK = 1024


def is_narrow(outputs: int, inputs: int) -> bool:
    """Returns whether the product with a weight [outputs, inputs] is split into sections of K.

    This depends on the weight's shape alone, so that all products with the weight have the same order of summation.
    """
    return 8 * outputs <= inputs


def tile_for(rows: int, item_bytes: int) -> Tile:
    """Returns the tile for a product with `rows` rows of x.

    The tile has at least 64 rows.
    """
    inner = 128 // item_bytes
    # On GPUs of compute capability 12.0, the compiler spills registers of this smaller tile without `max_registers`.
    if rows < MANY_ROWS:
        return Tile(rows=64, columns=32, inner=inner, num_warps=4, num_stages=4, max_registers=255)
    return Tile(rows=128, columns=64, inner=inner, num_warps=8, num_stages=4)


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Implements the protocol `Linear`, which is documented in the module `kernels.ops`."""
    rows, outputs = len(x), len(weight)
    out = x.new_empty(rows, outputs)
    if rows < MANY_ROWS:
        sums = section_sums(x, weight)
        grid = (cdiv(out.numel(), SUM_BLOCK),)
        bias_or_any = sums if bias is None else bias
        sum_kernel[grid](
            sums, bias_or_any, out, out.numel(), outputs, len(sums), HAS_BIAS=bias is not None, BLOCK=SUM_BLOCK
        )
        return out
    tile = tile_for(rows, x.element_size())
    narrow_kernel[(cdiv(rows, tile.rows), cdiv(outputs, tile.columns))](
        *(x, weight, weight if bias is None else bias, out, rows, outputs, x.shape[1], x.stride(0)),
        HAS_BIAS=bias is not None,
        SECTION=SECTION,
        **tile.options | EXACT,
    )
    return out


def section_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the part of x @ weight.T that each section of K contributes: float32 [sections, T, N]."""
    (rows, inputs), outputs = x.shape, len(weight)
    fits = x.dtype == weight.dtype and x.stride(1) == 1 and weight.shape[1] == inputs
    require(fits, "x", x, "have the weight's dtype and as many inputs, in contiguous rows")
    sums = torch.empty(cdiv(inputs, SECTION), rows, outputs, device=x.device)
    tile = tile_for(1, x.element_size())
    section_kernel[(cdiv(rows, tile.rows), cdiv(outputs, tile.columns), len(sums))](
        x, weight, sums, rows, outputs, inputs, x.stride(0), SECTION=SECTION, **tile.options | EXACT
    )
    return sums


@jit(do_not_specialize=["rows"])
def section_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Writes one section's part of one tile. The grid is (cdiv(rows, ROWS), cdiv(outputs, COLUMNS), sections)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start = tl.program_id(2) * SECTION
    x_at, weight_at = x + row.to(tl.int64) * x_stride + start, weight + column.to(tl.int64) * inputs + start
    size = tl.minimum(inputs - start, SECTION)
    total = section_product(x_at, weight_at, row < rows, column < outputs, size, ROWS, COLUMNS, INNER)
    at = sums + (tl.program_id(2).to(tl.int64) * rows + row) * outputs + column
    tl.store(at, total, mask=(row < rows) & (column < outputs))


@jit(do_not_specialize=["rows"])
def narrow_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Computes one tile of the product over all sections. The grid is (cdiv(rows, ROWS), cdiv(outputs, COLUMNS))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x_at, weight_at = x + row.to(tl.int64) * x_stride, weight + column.to(tl.int64) * inputs
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inputs, SECTION):
        size = tl.minimum(inputs - start, SECTION)
        total += section_product(x_at, weight_at, row < rows, column < outputs, size, ROWS, COLUMNS, INNER)
        x_at += SECTION
        weight_at += SECTION
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
    at = out + row.to(tl.int64) * outputs + column
    tl.store(at, rounded(total, out.type.element_ty), mask=(row < rows) & (column < outputs))


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
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds the parts of all sections, and the bias. The grid is (cdiv(size, BLOCK)), where `size` is out.numel()."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = add_sections(sums + at, at < size, sections, size)
    if HAS_BIAS:
        total += tl.load(bias + at % outputs, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(total, out.type.element_ty), mask=at < size)


@jit
def add_sections(sums: tl.tensor, mask: tl.tensor, sections: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Adds the parts of all sections in ascending order. The pointers `sums` point to the first section's parts."""
    total = tl.load(sums, mask=mask, other=0.0)
    for _ in range(1, sections):
        sums += stride
        total += tl.load(sums, mask=mask, other=0.0)
    return total
