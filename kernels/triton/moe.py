"""These kernels compute a mixture of experts as two grouped matrix products.

Rows are sorted by expert, and a tile has rows of one expert only. The number of tiles is known on the device only. The
grid therefore has the largest possible number of tiles, and each program finds its own expert. So the host does not
wait for the device. Tiles are numbered in groups, as in other products. Because the rows are sorted, the programs that
run at the same time read the weights of few experts.
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
from jamba_server.kernels.triton.gated import gated
from jamba_server.kernels.triton.launch import cdiv, follow, jit, next_power_of_2, rounded
from jamba_server.kernels.triton.product import GROUP, Tile, product, tile_for, tile_of
from jamba_server.kernels.triton.quantized import PackedWeight, pack, read

BLOCK = 1024


class Experts(NamedTuple):
    """Holds the weights of E experts: `gate_up` [E, 2F, H] and `down` [E, H, F].

    In `gate_up`, the F rows of an expert's gate come before the F rows of its up projection.
    """

    gate_up: Tensor | PackedWeight
    down: Tensor | PackedWeight


class Groups(NamedTuple):
    """Lists all pairs of a token and an expert that the token chose, sorted by expert.

    `entries`: int32 [T * K]; the entry t * K + i means that token t chose the expert at index i of its top-k list.
    `start`: int32 [E + 1]; the entries of expert e are entries[start[e]:start[e + 1]], in ascending order.
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
        groups = group_by_expert(ids, count)
        require(x.shape[1] == first.inputs == hidden, "x", x, "have as many inputs as both weights of the experts")
        rows, item_bytes, widths = tile_rows(tokens * top_k, count), x.element_size(), (2 * intermediate, hidden)
        tiles = [
            tile_for(rows, item_bytes, weight.format, width * min(count, tokens * top_k))
            for weight, width in zip((first, second), widths, strict=True)
        ]
        activated = x.new_empty(tokens * top_k, intermediate)
        constants = {"TOP_K": top_k, "EXPERTS": count, "BLOCK_E": next_power_of_2(count + 1), "GROUP": GROUP}
        row_tiles = _num_tiles(tokens * top_k, count, tiles[0])
        gate_up_kernel[(row_tiles * cdiv(intermediate, tiles[0].columns // 2),)](
            *(x, *first.tensors, *groups, activated, hidden, intermediate, x.stride(0), row_tiles),
            **constants,
            **_options(first, tiles[0]),
        )
        outputs = out.new_empty(tokens * top_k, hidden)
        row_tiles = _num_tiles(tokens * top_k, count, tiles[1])
        down_kernel[(row_tiles * cdiv(hidden, tiles[1].columns),)](
            *(activated, *second.tensors, *groups, weights, outputs, hidden, intermediate, row_tiles),
            **constants,
            **_options(second, tiles[1]),
        )
        sum_kernel[(tokens, cdiv(hidden, BLOCK))](outputs, out, hidden, TOP_K=top_k, BLOCK=BLOCK)


def group_by_expert(ids: Tensor, experts: int) -> Groups:
    """Sorts the choices of all tokens by expert. `ids`: int32 [T, K], contiguous, the experts of each token."""
    groups = Groups(torch.empty_like(ids).flatten(), ids.new_empty(experts + 1))
    group_kernel[(experts + 1,)](ids, *groups, ids.numel(), BLOCK=BLOCK)
    return groups


def tile_rows(choices: int, experts: int) -> int:
    """Returns the number of rows for which the tiles are chosen, if tokens have made `choices` choices of experts.

    It is one and a half times the average number of rows of an expert. An expert with more rows than a tile has takes
    two tiles, and both convert all numbers of the weight.
    """
    return cdiv(3 * choices, 2 * experts)


def _options(weight: PackedWeight, tile: Tile) -> dict[str, Any]:
    """Returns the keyword arguments of a launch that depend on the weight and on its tile."""
    return {"FORMAT": weight.format, "STAGES": tile.num_stages} | tile.options


def _num_tiles(choices: int, experts: int, tile: Tile) -> int:
    """Returns an upper bound for the total number of tiles of all experts.

    The last tile of an expert can have only one used row.
    """
    return min(choices, experts + (choices - 1) // tile.rows)


@jit(do_not_specialize=["choices"])
def group_kernel(ids: tl.tensor, entries: tl.tensor, start: tl.tensor, choices: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Lists the choices of one expert. The grid is (experts + 1).

    Every program counts the choices of the experts before its own, so that no program waits for another. The last
    program has no expert, and counts all choices.
    """
    follow()
    expert, i = tl.program_id(0), tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, choices, BLOCK):
        chosen = tl.load(ids + first + i, mask=first + i < choices, other=2**31 - 1)
        counts += (chosen < expert).to(tl.int32)
    place = tl.sum(counts, axis=0)
    tl.store(start + expert, place)
    for first in range(0, choices, BLOCK):
        mine = (tl.load(ids + first + i, mask=first + i < choices, other=-1) == expert).to(tl.int32)
        tl.store(entries + place + tl.cumsum(mine, 0) - 1, first + i, mask=mine > 0)
        place += tl.sum(mine, axis=0)


@jit
def find_tile(
    number: tl.tensor, entries: tl.tensor, start: tl.tensor,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Finds tile `number`. Returns the tile's expert and the tensors `row`, `entry` and `filled`, each [ROWS, 1].

    `row` has places among the rows sorted by expert, `entry` the elements of `entries` at these places, and
    `filled` says which rows of the tile are used. The expert is EXPERTS if there is no such tile.
    """
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(start + e, mask=e < EXPERTS, other=0)
    end = tl.load(start + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + (ROWS - 1)) // ROWS
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum(((ends <= number) & (e < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    row = tl.sum(tl.where(e == expert, begin, 0), 0) + (number - before) * ROWS + tl.arange(0, ROWS)[:, None]
    filled = row < tl.sum(tl.where(e == expert, end, 0), 0)
    return expert, row, tl.load(entries + row, mask=filled, other=0).to(tl.int64), filled


@jit(do_not_specialize=["row_tiles"])
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
    row_tiles: tl.tensor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Writes silu(gate) * up of every token and each of the token's experts to `activated`, sorted by expert.

    The grid is (row_tiles * cdiv(intermediate, COLUMNS // 2)).
    """
    follow()
    number, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(intermediate, COLUMNS // 2), GROUP)
    expert, row, entry, filled = find_tile(number, entries, start, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    # The columns of the tile alternate between gate and up. So one program computes the gate and the up value of the
    # same elements, and can multiply silu(gate) by up.
    pair = tl.arange(0, COLUMNS)[None, :]
    weight_column = column_tile * (COLUMNS // 2) + pair // 2
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
    column = column_tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    value = gated(both, activated.type.element_ty, ROWS, COLUMNS)
    tl.store(activated + row.to(tl.int64) * intermediate + column, value, mask=filled & (column < intermediate))


@jit(do_not_specialize=["row_tiles"])
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
    row_tiles: tl.tensor,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Writes each token's K expert outputs, multiplied by their weights, to `outputs` in the order of the top-k list.

    The grid is (row_tiles * cdiv(hidden, COLUMNS)).
    """
    follow()
    number, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(hidden, COLUMNS), GROUP)
    expert, row, entry, filled = find_tile(number, entries, start, EXPERTS, BLOCK_E, ROWS)
    if expert >= EXPERTS:
        return
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
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
    follow()
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(outputs + token * TOP_K * hidden + i, mask=i < hidden, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, TOP_K):
        total += tl.load(outputs + (token * TOP_K + rank) * hidden + i, mask=i < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + i, rounded(total, out.type.element_ty), mask=i < hidden)
