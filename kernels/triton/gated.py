"""These kernels compute silu(gate) * up, the activation of a gated MLP, alone or together with the product before it.

Together, neither gate nor up is written to memory: for a prompt this saves four fifths of what the two kernels would
read and write beside the weight, and in decode it saves a launch. Both ways give the same bits.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from jamba_server.kernels.triton.launch import cdiv, follow, jit, rounded, silu
from jamba_server.kernels.triton.product import GROUP, product, tile_for, tile_of
from jamba_server.kernels.triton.quantized import PackedWeight

BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Implements the protocol `SiluAndMul`, which is documented in the module `kernels.ops`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    silu_kernel[(rows, cdiv(size, BLOCK))](gate_up, out, size, gate_up.stride(0), BLOCK=BLOCK)
    return out


def gated_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Returns silu_and_mul(x @ weight.T), dtype [T, F], for a weight [2F, K] of the gate and the up projection."""
    rows, size = len(x), len(weight.words) // 2
    out = x.new_empty(rows, size)
    tile = tile_for(rows, x.element_size(), weight.format, 2 * size)
    gated_kernel[(cdiv(rows, tile.rows) * cdiv(size, tile.columns // 2),)](
        *(x, *weight.tensors, out, rows, size, weight.inputs, x.stride(0)),
        FORMAT=weight.format,
        STAGES=tile.num_stages,
        GROUP=GROUP,
        **tile.options,
    )
    return out


@jit(do_not_specialize=["rows"])
def gated_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Computes one tile of silu(x @ gate.T) * (x @ up.T). The grid is (cdiv(rows, ROWS) * cdiv(size, COLUMNS // 2)).

    The columns of the tile alternate between gate and up. So one program computes the gate and the up value of the same
    elements.
    """
    follow()
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(size, COLUMNS // 2), GROUP)
    row, pair = row_tile * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    column = column_tile * (COLUMNS // 2) + pair // 2
    both = product(
        x + row.to(tl.int64) * x_stride,
        (words, scales, supers, zeros, table),
        (pair % 2).to(tl.int64) * size + column,
        row < rows,
        column < size,
        inputs,
        2 * size,
        ROWS,
        COLUMNS,
        INNER,
        FORMAT,
        STAGES,
    )
    column = column_tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    value = gated(both, out.type.element_ty, ROWS, COLUMNS)
    tl.store(out + row.to(tl.int64) * size + column, value, mask=(row < rows) & (column < size))


@jit
def gated(both: tl.tensor, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Returns silu(gate) * up, rounded to `dtype`, for a float32 tile whose columns alternate between gate and up.

    All that the separate kernels would round is rounded in the same way.
    """
    gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS // 2, 2)))
    gate_silu = rounded(silu(rounded(gate, dtype).to(tl.float32)), dtype).to(tl.float32)
    return rounded(gate_silu * rounded(up, dtype).to(tl.float32), dtype)


@jit
def silu_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Computes silu(gate) * up for one block of a row. The grid is (rows, cdiv(size, BLOCK))."""
    follow()
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * row_stride + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + i, mask=i < size, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.type.element_ty
    tl.store(out + row * size + i, rounded(rounded(silu(gate), dtype).to(tl.float32) * up, dtype), mask=i < size)
