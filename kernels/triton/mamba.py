"""In a decode step, a Mamba layer computes the operations between in_proj and out_proj in three kernel launches.

The launches are the convolution, x_proj and a fused kernel. The fused kernel computes the norms, dt_proj and the state
update. It calls the same functions on the same tiles as the separate kernels, so it gives the same bits. With few rows
it also adds the sections of x_proj's product (see `kernels.triton.sections`). Every program repeats this sum, which for
many rows would cost more than a separate launch.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels import torch_ops
from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import KernelUnavailable, MambaWeights
from jamba_server.kernels.triton.conv import causal_conv1d_update
from jamba_server.kernels.triton.launch import EXACT, LOG2_E, cdiv, follow, jit, next_power_of_2, rounded
from jamba_server.kernels.triton.linear import Linear
from jamba_server.kernels.triton.norm import normalized, rms_norm, tile_rows
from jamba_server.kernels.triton.product import quantized_product
from jamba_server.kernels.triton.quantized import PackedWeight, read
from jamba_server.kernels.triton.scan import load, selective_state_update, step
from jamba_server.kernels.triton.sections import add_sections, section_of, section_product, section_sums, tile_for

PROGRAMS = 1024
"""This number of programs fills a large GPU. With fewer programs, each computes one row only."""
# The number of pipeline stages of the fused kernel. Two stages suffice, because the rows of dt_proj's weight are short.
# The buffers of more stages would let fewer programs run at once.
STAGES = 2


class MambaDecode:
    """Implements the protocol `MambaDecode`, which is documented in the module `kernels.ops`.

    It can also replace `torch_ops.Linear`, which computes products of few rows with Triton. This class always computes
    x_proj and dt_proj with Triton, for many rows too.
    """

    def __init__(self, *parts: object) -> None:
        kinds = (causal_conv1d_update, Linear, rms_norm, selective_state_update)
        for part, kind in zip(parts, kinds, strict=True):
            accepted = (kind, torch_ops.Linear) if kind is Linear else (kind,)
            if part is not kind and type(part) not in accepted:
                raise KernelUnavailable(f"it replaces kernels.triton's {kind.__name__}, which was not chosen")
        self._linear = Linear()

    def pack(self, weights: MambaWeights) -> MambaWeights:
        """Implements `MambaDecode.pack`, a method of the protocol that the module `kernels.ops` documents."""
        for name, weight in (("x_proj", weights.x_proj), ("dt_proj", weights.dt_proj)):
            if not isinstance(weight, Tensor | PackedWeight):
                raise TypeError(f"{name} must be one matrix; it is a {type(weight).__name__}")
        return weights._replace(scan=type(weights.scan)(*(weight.contiguous() for weight in weights.scan)))

    def __call__(
        self, xz: Tensor, weights: MambaWeights, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor
    ) -> Tensor:
        """Implements `MambaDecode.__call__`, a method of the protocol that the module `kernels.ops` documents."""
        x, z = xz.chunk(2, dim=-1)
        u = causal_conv1d_update(x, weights.conv_weight, weights.conv_bias, conv_state, state_ids)
        x_proj, quantized = read(weights.x_proj), bool(read(weights.dt_proj).format)
        few = program_rows(len(u), *weights.scan.a.shape, quantized=quantized) == 1
        sectioned = few and section_of(len(x_proj.words), x_proj.inputs) > 0
        projected = section_sums(u, x_proj) if sectioned else self._linear(u, weights.x_proj)
        return _update(u, z, projected, weights, ssm_state, state_ids)


def block_channels(states: int, *, quantized: bool = False) -> int:
    """Returns the number of channels that a program computes: 32, or more if each channel has few state entries, or 64
    if dt_proj is quantised, as in the tiles of the product with a quantised weight.

    Each thread must hold at least four elements of the state. Otherwise the sum over a channel's states would be
    distributed over threads in another way than in the scan, and its bits would differ.
    """
    return max(64 if quantized else 32, min(128, 512 // next_power_of_2(states)))


def program_rows(rows: int, channels: int, states: int, *, quantized: bool) -> int:
    """Returns the number of rows (tokens) that a program computes.

    A program reads its part of dt_proj's weight once for all its rows.
    """
    programs = rows * cdiv(channels, block_channels(states, quantized=quantized))
    return 1 if programs <= PROGRAMS else 4 if programs <= 4 * PROGRAMS else 16


def _update(
    u: Tensor, z: Tensor, projected: Tensor, weights: MambaWeights, ssm_state: Tensor, state_ids: Tensor
) -> Tensor:
    """Launches the fused kernel, which runs after x_proj. Returns the inputs of out_proj, a tensor [N, D] of u's dtype.

    `projected` is the result of x_proj [N, R + 2S], or the sums of its sections [sections, N, R + 2S].
    """
    (channels, states), rows = weights.scan.a.shape, len(u)
    require(u.is_contiguous(), "u", u, "be contiguous")
    require(z.stride(1) == 1, "z", z, "have contiguous rows")
    require(ssm_state.stride()[1:] == (states, 1), "ssm_state", ssm_state, "have contiguous slots of [D, S]")
    dt_proj = read(weights.dt_proj)
    quantized = bool(dt_proj.format)
    tile = tile_for(1, u.element_size(), dt_proj.format)
    rank, block = len(weights.dt_norm), block_channels(states, quantized=quantized)
    shared = program_rows(rows, channels, states, quantized=quantized)
    rank_block, state_block = next_power_of_2(rank), next_power_of_2(states)
    sections = len(projected) if projected.dim() == 3 else 0
    scratch = (u.new_empty(1 + bool(sections), rows, projected.shape[-1]), torch.empty_like(u))
    out = torch.empty_like(u)
    update_kernel[(cdiv(channels, block), cdiv(rows, shared))](
        u,
        z,
        projected,
        weights.dt_norm,
        weights.b_norm,
        weights.c_norm,
        *dt_proj.tensors,
        *weights.scan,
        ssm_state,
        state_ids,
        *scratch,
        out,
        rows,
        sections,
        channels,
        rank,
        z.stride(0),
        ssm_state.stride(0),
        weights.eps,
        FORMAT=dt_proj.format,
        STAGES=STAGES,
        STATES=states,
        ROWS=shared,
        SECTIONED=sections > 0,
        TILE_ROWS=tile.rows,
        BLOCK_D=block,
        BLOCK_P=next_power_of_2(projected.shape[-1]),
        INNER=tile.inner,
        BLOCK_R=rank_block,
        NORM_ROWS_R=tile_rows(rank_block),
        BLOCK_S=state_block,
        NORM_ROWS_S=tile_rows(state_block),
        num_warps=tile.num_warps,
        num_stages=STAGES,
        **EXACT,
    )
    return out


@jit
def dt_product(
    x: tl.tensor, weight: tl.tuple, weight_row: tl.tensor, x_mask: tl.tensor, weight_mask: tl.tensor,
    rank: tl.tensor, channels: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, FORMAT: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Returns the product of a tile of x with the weight dt_proj, which may be quantised."""
    if FORMAT == "":
        total = section_product(x, weight[0] + weight_row * rank, x_mask, weight_mask, rank, ROWS, COLUMNS, INNER)
    else:
        total = quantized_product(
            x, weight, weight_row, x_mask, weight_mask, 0, rank, rank, channels, ROWS, COLUMNS, FORMAT, STAGES
        )
    return total


@jit(do_not_specialize=["rows"])
def update_kernel(
    u: tl.tensor, z: tl.tensor, projected: tl.tensor, dt_norm: tl.tensor, b_norm: tl.tensor, c_norm: tl.tensor,
    words: tl.tensor, scales: tl.tensor, supers: tl.tensor, zeros: tl.tensor, table: tl.tensor, a: tl.tensor,
    d: tl.tensor, dt_bias: tl.tensor, ssm_state: tl.tensor, state_ids: tl.tensor, normed: tl.tensor, dt: tl.tensor,
    out: tl.tensor, rows: tl.tensor, sections: tl.tensor, channels: tl.tensor, rank: tl.tensor, z_stride: tl.tensor,
    slot_stride: tl.tensor, eps: tl.tensor, FORMAT: tl.constexpr, STAGES: tl.constexpr, STATES: tl.constexpr,
    ROWS: tl.constexpr, SECTIONED: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    INNER: tl.constexpr, BLOCK_R: tl.constexpr, NORM_ROWS_R: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM_ROWS_S: tl.constexpr,
) -> None:  # fmt: skip
    """Computes the norms, dt_proj and the state update. The grid is (cdiv(channels, BLOCK_D), cdiv(rows, ROWS)).

    `normed` [1 or 2, rows, rank + 2 * STATES] and `dt` [rows, channels] are scratch memory: a program writes tiles
    there and reads them in another layout. All programs of the same rows write the same bits into `normed`. With
    SECTIONED, where ROWS is 1, `projected` holds the sums of x_proj's sections. `words` to `table` belong to dt_proj.
    """
    follow()
    first, width = tl.program_id(1).to(tl.int64) * ROWS, rank + 2 * STATES
    end = tl.minimum(first + ROWS, rows)
    if SECTIONED:
        column = first * width + tl.arange(0, BLOCK_P)
        mask = tl.arange(0, BLOCK_P) < width
        total = add_sections(projected + column, mask, sections, rows.to(tl.int64) * width)
        projected = normed + rows.to(tl.int64) * width
        tl.store(projected + column, rounded(total, normed.type.element_ty), mask=mask)
        tl.debug_barrier()
    normalize(projected, normed, dt_norm, first, end, width, rank, eps, ROWS, BLOCK_R, NORM_ROWS_R)
    b_at, c_at = normed + rank, normed + rank + STATES
    normalize(projected + rank, b_at, b_norm, first, end, width, STATES, eps, ROWS, BLOCK_S, NORM_ROWS_S)
    normalize(projected + rank + STATES, c_at, c_norm, first, end, width, STATES, eps, ROWS, BLOCK_S, NORM_ROWS_S)
    tl.debug_barrier()
    row = first + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    normed_at, place, here, exists = normed + row * width, column.to(tl.int64), row < end, column < channels
    dt_proj = (words, scales, supers, zeros, table)
    total = dt_product(
        normed_at, dt_proj, place, here, exists, rank, channels, TILE_ROWS, BLOCK_D, INNER, FORMAT, STAGES
    )
    tl.store(dt + row * channels + column, rounded(total, dt.type.element_ty), mask=here & exists)
    tl.debug_barrier()
    channel, s = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside, inside_s = channel < channels, s < STATES
    place, inside_state = channel[:, None] * STATES + s[None, :], inside[:, None] & inside_s[None, :]
    rate = tl.load(a + place, mask=inside_state, other=0.0) * LOG2_E
    skip, bias = tl.load(d + channel, mask=inside, other=0.0), tl.load(dt_bias + channel, mask=inside, other=0.0)
    u_at, dt_at, z_at, out_at, state_at = u + channel, dt + channel, z + channel, out + channel, ssm_state + place
    slot = tl.load(state_ids + first).to(tl.int64) * slot_stride
    h = tl.load(state_at + slot, mask=inside_state, other=0.0)
    for _ in range(first, end):
        # The Mamba state of the next row is loaded while the current row's output is computed.
        following = tl.minimum(first + 1, end - 1)
        next_slot = tl.load(state_ids + following).to(tl.int64) * slot_stride
        next_h = tl.load(state_at + next_slot, mask=inside_state, other=0.0)
        at = first * channels
        u_t, dt_t, z_t = load(u_at + at, inside), load(dt_at + at, inside), load(z_at + first * z_stride, inside)
        b_t, c_t = load(b_at + first * width + s, inside_s), load(c_at + first * width + s, inside_s)
        h, y = step(h, u_t, dt_t, z_t, b_t, c_t, rate, skip, bias)
        tl.store(out_at + at, rounded(y, out.type.element_ty), mask=inside)
        tl.store(state_at + slot, h, mask=inside_state)
        first, slot, h = following, next_slot, next_h


@jit
def normalize(
    x: tl.tensor,
    normed: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
) -> None:
    """Applies RMSNorm to the rows `first` to `end` - 1 (at most ROWS), in tiles of the same shape as in `rms_norm`."""
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, mask=column < size, other=0.0)
    for start in tl.static_range(0, ROWS, TILE_ROWS):
        row = first + start + tl.arange(0, TILE_ROWS)[:, None]
        at, mask = row * stride + column, (row < end) & (column < size)
        s = tl.load(x + at, mask=mask, other=0.0)
        tl.store(normed + at, normalized(s, scale, size, eps), mask=mask)
