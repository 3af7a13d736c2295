"""This kernel computes RMSNorm. A program computes one long row or several short rows."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.triton.launch import EXACT, cdiv, follow, jit, next_power_of_2, rounded

# The number of elements that a program normalises. If a row has more elements, a program normalises only this row.
PROGRAM_ELEMENTS = 2048


def tile_rows(block: int) -> int:
    """Returns the number of rows in a tile, where each row is padded to `block` elements.

    This number and the number of warps determine the order in which a row is summed.
    """
    return max(1, PROGRAM_ELEMENTS // block)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Implements the protocol `RmsNorm`, which is documented in the module `kernels.ops`."""
    rows, size = x.shape
    block = next_power_of_2(size)
    block_rows = tile_rows(block)
    normed = x.new_empty(rows, size)
    summed = x if residual is None else torch.empty_like(normed)
    added = x if residual is None else residual
    norm_kernel[(cdiv(rows, block_rows),)](
        x,
        added,
        weight,
        normed,
        summed,
        rows,
        size,
        x.stride(0),
        added.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        ROWS=block_rows,
        BLOCK=block,
        num_warps=8 if block > PROGRAM_ELEMENTS else 4,
        **EXACT,
    )
    return normed, summed


@jit(do_not_specialize=["rows"])
def norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    summed: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds the tensor `residual`, if given, to ROWS rows of x. Normalises the sums. The grid is (cdiv(rows, ROWS))."""
    follow()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < size)
    s = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        s = rounded(s.to(tl.float32) + added.to(tl.float32), s.dtype)
        tl.store(summed + row * size + column, s, mask=mask)
    scale = tl.load(weight + column, mask=column < size, other=0.0)
    tl.store(normed + row * size + column, normalized(s, scale, size, eps), mask=mask)


@jit
def normalized(s: tl.tensor, scale: tl.tensor, size: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """Divides each row by its root mean square and multiplies it by `scale`.

    A row of the tile `s` has `size` elements, followed by zeros.
    """
    wide = s.to(tl.float32)
    variance = tl.sum(wide * wide, axis=1, keep_dims=True) / size
    unit = rounded(wide * tl.rsqrt(variance + eps), s.dtype).to(tl.float32)
    return rounded(unit * scale.to(tl.float32), s.dtype)
