"""These kernels compute a mixture of experts as two grouped matrix products.

Dense layers use only the function `silu_and_mul` of this module. Rows are sorted by expert, and a tile has rows of one
expert only. The number of tiles is known on the device only. The grid therefore has the largest possible number of
tiles, and each program finds its own expert. So the host does not wait for the device.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.kernels.triton.launch import cdiv, jit, next_power_of_2, rounded, silu
from jamba_server.kernels.triton.product import Tile, product, tile_for
from jamba_server.kernels.triton.quantized import PackedWeight, pack, read

BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Implements the protocol `SiluAndMul`, which is documented in the module `kernels.ops`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    silu_kernel[(rows, cdiv(size, BLOCK))](gate_up, out, size, gate_up.stride(0), BLOCK=BLOCK)
    return out


class Experts(NamedTuple):
    """Holds the weights of E experts: `gate_up` [E, 2F, H] and `down` [E, H, F].

    In `gate_up`, the F rows of an expert's gate come before the F rows of its up projection.
    """

    gate_up: Tensor | PackedWeight
    down: Tensor | PackedWeight


class Groups(NamedTuple):
    """Lists all pairs of a token and an expert that the token chose, sorted by expert.

    `entries`: int64 [T * K]; the entry t * K + i means that token t chose the expert at index i of its top-k list.
    `start`: int64 [E + 1]; the entries of expert e are entries[start[e]:start[e + 1]].
    """

    entries: Tensor
    start: Tensor


class RunExperts:
    """Implements the protocol `RunExperts`, which is documented in the module `kernels.ops`."""

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Experts:
        """Packs quantised weights without making them larger. Weights that are not quantised keep their layout."""
        return Experts(*(w.contiguous() if isinstance(w, Tensor) else pack(w) for w in (gate_up, down)))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """Implements `RunExperts.__call__`, a method of the protocol that the module `kernels.ops` documents."""
        out = x.new_empty(x.shape)
        self._mix(x, experts, weights, ids, out)
        return out

    def sums(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """Implements `RunExperts.sums`, a method of the protocol that the module `kernels.ops` documents."""
        require(out.dtype == torch.float32 and out.is_contiguous(), "out", out, "be float32 and contiguous")
        self._mix(x, experts, weights.to(x.dtype).float(), ids, out)

    def _mix(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """Writes the weighted sums to `out`, and rounds the outputs of the experts and the sums to its dtype."""
        require(x.stride(1) == 1, "x", x, "have contiguous rows")
        weights, ids = weights.contiguous(), ids.contiguous()
        tokens, top_k = ids.shape
        first, second = read(experts.gate_up), read(experts.down)
        count, hidden, intermediate = *second.words.shape[:2], second.inputs
        in_order = ids.flatten().sort(stable=True)
        start = torch.searchsorted(in_order.values, torch.arange(count + 1, device=x.device, dtype=torch.int32))
        groups = Groups(in_order.indices, start)
        require(x.shape[1] == first.inputs == hidden, "x", x, "have as many inputs as both weights of the experts")
        tiles = [tile_for(tokens * top_k, x.element_size(), w.format) for w in (first, second)]
        activated = x.new_empty(tokens * top_k, intermediate)
        constants = {"TOP_K": top_k, "EXPERTS": count, "BLOCK_E": next_power_of_2(count + 1)}
        grid = (_num_tiles(tokens * top_k, count, tiles[0]), cdiv(intermediate, tiles[0].columns // 2))
        gate_up_kernel[grid](
            *(x, *first.tensors, *groups, activated, hidden, intermediate, x.stride(0)),
            **constants,
            **_options(first, tiles[0]),
        )
        outputs = out.new_empty(tokens * top_k, hidden)
        grid = (_num_tiles(tokens * top_k, count, tiles[1]), cdiv(hidden, tiles[1].columns))
        down_kernel[grid](
            *(activated, *second.tensors, *groups, weights, outputs, hidden, intermediate),
            **constants,
            **_options(second, tiles[1]),
        )
        sum_kernel[(tokens, cdiv(hidden, BLOCK))](outputs, out, hidden, TOP_K=top_k, BLOCK=BLOCK)


def _options(weight: PackedWeight, tile: Tile) -> dict[str, Any]:
    """Returns the keyword arguments of a launch that depend on the weight and on its tile."""
    return {"FORMAT": weight.format, "STAGES": tile.num_stages} | tile.options


def _num_tiles(choices: int, experts: int, tile: Tile) -> int:
    """Returns an upper bound for the total number of tiles of all experts.

    The last tile of an expert can have only one used row.
    """
    return min(choices, experts + (choices - 1) // tile.rows)


@jit
def find_tile(
    entries: tl.tensor, start: tl.tensor, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Finds this program's tile. Returns the tile's expert and the tensors `row`, `entry` and `filled`, each [ROWS, 1].

    `row` has places among the rows sorted by expert, `entry` the elements of `entries` at these places, and
    `filled` says which rows of the tile are used. The expert is EXPERTS if the program has no tile.
    """
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(start + e, mask=e < EXPERTS, other=0)
    end = tl.load(start + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + (ROWS - 1)) // ROWS
    ends = tl.cumsum(tiles, 0)
    number = tl.program_id(0)
    expert = tl.sum(((ends <= number) & (e < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    row = tl.sum(tl.where(e == expert, begin, 0), 0) + (number - before) * ROWS + tl.arange(0, ROWS)[:, None]
    filled = row < tl.sum(tl.where(e == expert, end, 0), 0)
    return expert, row, tl.load(entries + row, mask=filled, other=0), filled


@jit
def gate_up_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    entries: tl.tensor,
    start: tl.tensor,
    activated: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    x_stride: tl.tensor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Writes silu(gate) * up of every token and each of the token's experts to `activated`, sorted by expert.

    The grid is (tiles, cdiv(intermediate, COLUMNS // 2)).
    """
    expert, row, entry, filled = find_tile(entries, start, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    # The columns of the tile alternate between gate and up. So one program computes the gate and the up value of the
    # same elements, and can multiply silu(gate) by up.
    pair = tl.arange(0, COLUMNS)[None, :]
    weight_column = tl.program_id(1) * (COLUMNS // 2) + pair // 2
    weight_row = (expert.to(tl.int64) * 2 + pair % 2) * intermediate + weight_column
    both = product(
        x + entry // TOP_K * x_stride,
        (words, scales, supers, zeros, table),
        weight_row,
        filled,
        weight_column < intermediate,
        hidden,
        EXPERTS * 2 * intermediate,
        ROWS,
        COLUMNS,
        INNER,
        FORMAT,
        STAGES,
    )
    gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS // 2, 2)))
    column = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    dtype: tl.constexpr = activated.type.element_ty
    gate_silu = rounded(silu(rounded(gate, dtype).to(tl.float32)), dtype).to(tl.float32)
    value = rounded(gate_silu * rounded(up, dtype).to(tl.float32), dtype)
    tl.store(activated + row.to(tl.int64) * intermediate + column, value, mask=filled & (column < intermediate))


@jit
def down_kernel(
    activated: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    supers: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    entries: tl.tensor,
    start: tl.tensor,
    weights: tl.tensor,
    outputs: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Writes each token's K expert outputs, multiplied by their weights, to `outputs` in the order of the top-k list.

    The grid is (tiles, cdiv(hidden, COLUMNS)).
    """
    expert, row, entry, filled = find_tile(entries, start, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = column < hidden
    activated_row = activated + row.to(tl.int64) * intermediate
    down_row = expert.to(tl.int64) * hidden + column
    total = product(
        activated_row,
        (words, scales, supers, zeros, table),
        down_row,
        filled,
        mask,
        intermediate,
        EXPERTS * hidden,
        ROWS,
        COLUMNS,
        INNER,
        FORMAT,
        STAGES,
    )
    dtype: tl.constexpr = outputs.type.element_ty
    weight = rounded(tl.load(weights + entry, mask=filled, other=0.0), dtype).to(tl.float32)
    value = rounded(rounded(total, dtype).to(tl.float32) * weight, dtype)
    tl.store(outputs + entry * hidden + column, value, mask=filled & mask)


@jit
def sum_kernel(
    outputs: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums a token's expert outputs in the order of its top-k list. The grid is (tokens, cdiv(hidden, BLOCK))."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(outputs + token * TOP_K * hidden + i, mask=i < hidden, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, TOP_K):
        total += tl.load(outputs + (token * TOP_K + rank) * hidden + i, mask=i < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + i, rounded(total, out.type.element_ty), mask=i < hidden)


@jit
def silu_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Computes silu(gate) * up for one block of a row. The grid is (rows, cdiv(size, BLOCK))."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * row_stride + i, mask=i < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + i, mask=i < size, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.type.element_ty
    tl.store(out + row * size + i, rounded(rounded(silu(gate), dtype).to(tl.float32) * up, dtype), mask=i < size)
