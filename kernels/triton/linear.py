"""Matrix product with a weight, the same bits for a row whatever stands beside it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import rounded
from kernels.triton.product import product, tile_for


class Linear:
    """See `kernels.ops.Linear`. torch's own product, which picks its order by the number of rows, is the reference."""

    def pack(self, weight: Tensor) -> Tensor:
        """Keeps the layout."""
        return weight.contiguous()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `kernels.ops.Linear`."""
        rows, inputs = x.shape
        outputs = len(weight)
        assert x.dtype == weight.dtype and x.stride(1) == 1 and weight.shape[1] == inputs
        tile = tile_for(rows, x.element_size())
        out = x.new_empty(rows, outputs)
        linear_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.columns))](
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            outputs,
            inputs,
            x.stride(0),
            HAS_BIAS=bias is not None,
            **tile.options,
        )
        return out


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    rows: Any,
    outputs: Any,
    inputs: Any,
    x_stride: Any,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """Grid (cdiv(rows, ROWS), cdiv(outputs, COLUMNS)): neighbours share a part of the weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = product(
        x + row.to(tl.int64) * x_stride,
        weight + column.to(tl.int64) * inputs,
        row < rows,
        column < outputs,
        inputs,
        ROWS,
        COLUMNS,
        INNER,
    )
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
    at = out + row.to(tl.int64) * outputs + column
    tl.store(at, rounded(total, out.dtype.element_ty), mask=(row < rows) & (column < outputs))
