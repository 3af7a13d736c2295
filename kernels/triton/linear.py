"""These kernels compute the batch-invariant matrix product with a weight."""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import QuantizedWeight, SiluAndMul, StackedWeight, Weight
from jamba_server.kernels.triton.formats import chunk_of, group_of, has, part_of
from jamba_server.kernels.triton.gated import gated_linear, silu_and_mul
from jamba_server.kernels.triton.launch import EXACT, cdiv, follow, jit, rounded
from jamba_server.kernels.triton.product import GROUP, product, tile_for, tile_of
from jamba_server.kernels.triton.quantized import SUPER, PackedWeight, factors, numbers, pack, read
from jamba_server.kernels.triton.sections import section_of, sectioned_linear

CHUNKS = 16  # The number of chunks of a row that a program of `rows_kernel` converts.


class Stacked(NamedTuple):
    """Holds the packed parts of a `StackedWeight`."""

    parts: tuple[Tensor | PackedWeight, ...]


class Linear:
    """Implements the protocol `Linear`, which is documented in the module `kernels.ops`."""

    def pack(self, weight: Weight) -> Tensor | PackedWeight | Stacked:
        """Packs a quantised weight without making it larger. A weight that is not quantised keeps its layout."""
        if isinstance(weight, StackedWeight):
            return Stacked(tuple(pack_one(part) for part in weight.parts))
        return pack_one(weight)

    def rows(self, weight: Tensor | PackedWeight, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Implements `Linear.rows`, a method of the protocol that the module `kernels.ops` documents."""
        if isinstance(weight, Tensor):
            return F.embedding(ids, weight)
        if dtype is None:
            raise TypeError("dtype must be given for rows of a quantised weight")
        out = torch.empty(len(ids), weight.inputs, dtype=dtype, device=ids.device)
        grid = (len(ids), cdiv(cdiv(weight.inputs, chunk_of(weight.format)), CHUNKS))
        rows_kernel[grid](
            *(*weight.tensors, ids, out, weight.inputs, len(weight.words)),
            **EXACT,
            FORMAT=weight.format,
            CHUNKS=CHUNKS,
        )
        return out

    def __call__(self, x: Tensor, weight: Tensor | PackedWeight | Stacked, bias: Tensor | None = None) -> Tensor:
        """Implements `Linear.__call__`, a method of the protocol that the module `kernels.ops` documents."""
        parts = [read(part) for part in (weight.parts if isinstance(weight, Stacked) else (weight,))]
        out, start = x.new_empty(len(x), sum(len(part.words) for part in parts)), 0
        for part in parts:
            end = start + len(part.words)
            _multiply(x, part, None if bias is None else bias[start:end], out[:, start:end])
            start = end
        return out

    def gated(self, x: Tensor, weight: Tensor | PackedWeight | Stacked, activation: SiluAndMul) -> Tensor:
        """Implements `GatedLinear.gated`, a method of the protocol that the module `kernels.gated_linear` documents."""
        packed = None if isinstance(weight, Stacked) else read(weight)
        if activation is not silu_and_mul or packed is None or section_of(len(packed.words), packed.inputs):
            return activation(self(x, weight))
        _check(x, packed)
        return gated_linear(x, packed)

    def sums(self, x: Tensor, weight: Tensor | PackedWeight, out: Tensor) -> None:
        """Implements `Linear.sums`, a method of the protocol that the module `kernels.ops` documents."""
        require(out.dtype == torch.float32 and out.is_contiguous(), "out", out, "be float32 and contiguous")
        _multiply(x, read(weight), None, out)


def pack_one(weight: Tensor | QuantizedWeight) -> Tensor | PackedWeight:
    """Packs a weight that is quantised. Another weight keeps its layout."""
    return weight.contiguous() if isinstance(weight, Tensor) else pack(weight)


def _multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Writes x @ weight.T + bias to `out` [T, N], whose rows may be parts of wider rows."""
    rows, outputs = out.shape
    _check(x, weight)
    if section_of(outputs, weight.inputs):
        sectioned_linear(x, weight, bias, out)
        return
    tile = tile_for(rows, x.element_size(), weight.format, outputs)
    linear_kernel[(cdiv(rows, tile.rows) * cdiv(outputs, tile.columns),)](
        x,
        *weight.tensors,
        weight.words if bias is None else bias,
        out,
        rows,
        outputs,
        weight.inputs,
        x.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        FORMAT=weight.format,
        STAGES=tile.num_stages,
        GROUP=GROUP,
        **tile.options,
    )


def _check(x: Tensor, weight: PackedWeight) -> None:
    """Raises ValueError if x cannot be multiplied by the weight."""
    fits = x.shape[1] == weight.inputs and x.stride(1) == 1 and (bool(weight.format) or x.dtype == weight.words.dtype)
    require(fits, "x", x, "have the weight's dtype and as many inputs, in contiguous rows")


@jit(do_not_specialize=["rows"])
def linear_kernel(
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
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Computes one tile of x @ weight.T + bias. The grid is (cdiv(rows, ROWS) * cdiv(outputs, COLUMNS))."""
    follow()
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS), GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = product(
        x + row.to(tl.int64) * x_stride,
        (words, scales, supers, zeros, table),
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
    at = out + row.to(tl.int64) * out_stride + column
    tl.store(at, rounded(total, out.type.element_ty), mask=(row < rows) & (column < outputs))


@jit
def rows_kernel(
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    inputs: tl.tensor,
    weight_rows: tl.tensor,
    FORMAT: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Converts some chunks of one row of a quantised weight. The grid is (len(ids), cdiv(chunks of a row, CHUNKS))."""
    follow()
    inner: tl.constexpr = part_of(FORMAT)
    chunk: tl.constexpr = chunk_of(FORMAT)
    size: tl.constexpr = group_of(FORMAT)
    level: tl.constexpr = 2 if has(FORMAT, "offsets") else 1
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    number = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)[:, None]
    mask = number * chunk < inputs
    words_at = words + row * (tl.cdiv(inputs, chunk) * (inner // 2)) + number * (inner // 2)
    packed = tl.load(words_at + tl.arange(0, inner // 2)[None, :], mask=mask, other=0)
    super_at = supers + (number * chunk // SUPER * level).to(tl.int64) * weight_rows + row
    for part in tl.static_range(chunk // inner):
        k = number * chunk + part * inner
        group = (k // size if size else k * 0).to(tl.int64)
        zero = mask
        if has(FORMAT, "zeros"):
            zero = tl.load(zeros + group * weight_rows + row, mask=mask, other=0)
        scale_at = scales + group * level * weight_rows + row
        x = numbers(packed, zero, table, part, FORMAT, tl.float32) * factors(scale_at, super_at, mask, FORMAT)
        if has(FORMAT, "offsets"):
            x += factors(scale_at + weight_rows, super_at + weight_rows, mask, FORMAT)
        k += tl.arange(0, inner)[None, :]
        at = out + tl.program_id(0).to(tl.int64) * inputs + k
        tl.store(at, rounded(x, out.type.element_ty), mask=k < inputs)
