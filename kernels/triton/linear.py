"""These kernels compute the batch-invariant matrix product with a weight."""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import StackedWeight, Weight
from jamba_server.kernels.triton.launch import cdiv, jit, rounded
from jamba_server.kernels.triton.narrow import is_narrow, narrow_linear
from jamba_server.kernels.triton.product import product, tile_for
from jamba_server.kernels.triton.quantized import PackedWeight, pack, read


class Linear:
    """Implements the protocol `Linear`, which is documented in the module `kernels.ops`."""

    def pack(self, weight: Weight) -> Tensor | PackedWeight:
        """Packs a quantised weight without making it larger. A weight that is not quantised keeps its layout."""
        if isinstance(weight, StackedWeight):
            raise ValueError("the triton kernels read one matrix, not several of different formats")
        return weight.contiguous() if isinstance(weight, Tensor) else pack(weight)

    def rows(self, weight: Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Implements `Linear.rows`, a method of the protocol that the module `kernels.ops` documents."""
        return F.embedding(ids, weight)

    def __call__(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
        """Implements `Linear.__call__`, a method of the protocol that the module `kernels.ops` documents."""
        data, scales, inputs, format = read(weight)
        rows, outputs = len(x), len(data)
        fits = x.shape[1] == inputs and x.stride(1) == 1 and (bool(format) or x.dtype == data.dtype)
        require(fits, "x", x, "have the weight's dtype and as many inputs, in contiguous rows")
        if not format and is_narrow(outputs, inputs):
            return narrow_linear(x, data, bias)
        tile = tile_for(rows, x.element_size(), quantized=bool(format))
        out = x.new_empty(rows, outputs)
        linear_kernel[(cdiv(rows, tile.rows), cdiv(outputs, tile.columns))](
            x,
            data,
            scales,
            data if bias is None else bias,
            out,
            rows,
            outputs,
            inputs,
            x.stride(0),
            HAS_BIAS=bias is not None,
            FORMAT=format,
            STAGES=tile.num_stages,
            **tile.options,
        )
        return out


@jit(do_not_specialize=["rows"])
def linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Computes one tile of x @ weight.T + bias. The grid is (cdiv(rows, ROWS), cdiv(outputs, COLUMNS)).

    Programs with consecutive ids read the same part of the weight, so the cache serves all but the first of them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = product(
        x + row.to(tl.int64) * x_stride,
        weight,
        scales,
        column.to(tl.int64),
        row < rows,
        column < outputs,
        inputs,
        outputs,
        ROWS,
        COLUMNS,
        INNER,
        FORMAT,
        STAGES,
    )
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
    at = out + row.to(tl.int64) * outputs + column
    tl.store(at, rounded(total, out.type.element_ty), mask=(row < rows) & (column < outputs))
