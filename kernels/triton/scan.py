"""A program of this selective scan computes a few channels of a sequence and keeps their state in registers.

A program processes the tokens in the order of time, so a chunk may end anywhere. Blocks of channels are narrow, so that
one long prompt still gives hundreds of programs. Tokens are processed in groups: the inputs of the next group are
loaded while the current group is computed. dt and the gate, which do not depend on the state, are computed as one tile
for a whole group, so that all threads take part.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import ScanInputs, ScanWeights, Segments
from jamba_server.kernels.triton.launch import (
    EXACT,
    LOG2_E,
    cdiv,
    follow,
    jit,
    next_power_of_2,
    rounded,
    silu,
    softplus,
)

# The number of tokens in a group. The inputs of a group's tokens are loaded together. A larger group would need more
# registers than a thread has.
GROUP = 4
SCHEDULERS = 528  # The number of warp schedulers of an H100 or H200 GPU.
OPTIONS: dict[str, Any] = EXACT | {"num_warps": 1}


def selective_scan(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    """Implements the protocol `SelectiveScan`, which is documented in the module `kernels.ops`."""
    ragged = (segments.query_start, segments.state_ids, segments.has_state, *segments.saves)
    return _launch(inputs, weights, ssm_state, ragged, decode=False)


def selective_state_update(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
    """Implements the protocol `SelectiveStateUpdate`, which is documented in the module `kernels.ops`."""
    return _launch(inputs, weights, ssm_state, (state_ids,) * 6, decode=True)


def _launch(
    inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, ragged: tuple[Tensor, ...], *, decode: bool
) -> Tensor:
    channels, states = weights.a.shape
    for name, part in zip(ScanInputs._fields, inputs, strict=True):
        require(part.stride(1) == 1, name, part, "have contiguous rows")
    require(ssm_state.stride()[1:] == (states, 1), "ssm_state", ssm_state, "have contiguous slots of [D, S]")
    out = inputs.u.new_empty(inputs.u.shape[0], channels)
    block = block_channels(channels, states, sequences=len(ragged[1]))
    scan_kernel[(cdiv(channels, block), len(ragged[1]))](
        *inputs,
        *(weight.contiguous() for weight in weights),
        ssm_state,
        out,
        *ragged,
        channels,
        *(rows.stride(0) for rows in inputs),
        ssm_state.stride(0),
        STATES=states,
        BLOCK_D=block,
        BLOCK_S=next_power_of_2(states),
        GROUP=1 if decode else GROUP,
        DECODE=decode,
        **OPTIONS,
    )
    return out


def block_channels(channels: int, states: int, *, sequences: int) -> int:
    """Returns how many channels one program computes. A program is one warp.

    The number is smaller where there are too few warps to fill a large GPU: a warp with fewer channels reaches the next
    token sooner. Every thread has at least four elements of a block, so that the sum over a channel's states is always
    distributed over the threads in the same way.
    """
    wide = sequences * cdiv(channels, 16) >= 2 * SCHEDULERS
    return max(16 if wide else 8, min(32, 128 // next_power_of_2(states)))


@jit
def scan_kernel(
    u: tl.tensor, dt: tl.tensor, b: tl.tensor, c: tl.tensor, z: tl.tensor,
    a: tl.tensor, d: tl.tensor, dt_bias: tl.tensor,
    ssm_state: tl.tensor, out: tl.tensor,
    query_start: tl.tensor, state_ids: tl.tensor, has_state: tl.tensor,
    save_start: tl.tensor, save_rows: tl.tensor, save_slots: tl.tensor,
    channels: tl.tensor,
    u_stride: tl.tensor, dt_stride: tl.tensor, b_stride: tl.tensor, c_stride: tl.tensor, z_stride: tl.tensor,
    slot_stride: tl.tensor,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr,
) -> None:  # fmt: skip
    """Scans one block of channels of one sequence. The grid is (cdiv(channels, BLOCK_D), sequences).

    With DECODE, row i is the only row of sequence i, and every sequence has a state.
    """
    follow()
    sequence = tl.program_id(1)
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    slot = tl.load(state_ids + sequence).to(tl.int64)
    h = tl.load(ssm_state + slot * slot_stride + place, mask=inside_state, other=0.0)
    if DECODE:
        row, end, save, last_save = sequence, sequence + 1, 0, 0
    else:
        row, end = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
        save, last_save = tl.load(save_start + sequence), tl.load(save_start + sequence + 1)
        h = tl.where(tl.load(has_state + sequence) != 0, h, 0.0)
    walk(
        h, row, end, u, dt, b, c, z, a, d, dt_bias, ssm_state, out, slot, True,
        save, last_save, save_rows, save_slots,
        channels, u_stride, dt_stride, b_stride, c_stride, z_stride, slot_stride, STATES, BLOCK_D, BLOCK_S, GROUP,
    )  # fmt: skip


@jit
def walk(
    h: tl.tensor, row: tl.tensor, end: tl.tensor,
    u: tl.tensor, dt: tl.tensor, b: tl.tensor, c: tl.tensor, z: tl.tensor,
    a: tl.tensor, d: tl.tensor, dt_bias: tl.tensor,
    ssm_state: tl.tensor, out: tl.tensor, slot: tl.tensor, is_last: tl.tensor,
    save: tl.tensor, last_save: tl.tensor, save_rows: tl.tensor, save_slots: tl.tensor,
    channels: tl.tensor,
    u_stride: tl.tensor, dt_stride: tl.tensor, b_stride: tl.tensor, c_stride: tl.tensor, z_stride: tl.tensor,
    slot_stride: tl.tensor,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Scans the rows from `row` to `end` - 1 of a sequence, starting from the state h [D, S].

    Of the sequence's state saves, numbered from `save` to `last_save`, it writes those that fall on these rows. If
    `is_last`, it also writes the final state to `slot`.
    """
    first = row
    channel, s, group = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S), tl.arange(0, GROUP)
    inside, inside_s, group = (channel < channels)[None, :], s < STATES, group[:, None]
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    rate = tl.load(a + place, mask=inside_state, other=0.0) * LOG2_E
    skip = tl.load(d + channel, mask=channel < channels, other=0.0)[None, :]
    bias = tl.load(dt_bias + channel, mask=channel < channels, other=0.0)[None, :]
    u_at, dt_at, z_at = u + channel[None, :], dt + channel[None, :], z + channel[None, :]
    # Each iteration scans up to the next row whose state must be saved. The last iteration scans up to `end`.
    for i in range(save, last_save + 1):
        more = i < last_save
        saved = tl.load(save_rows + i, mask=more, other=0)
        stop = tl.where(more, tl.minimum(tl.maximum(saved + 1, first), end), end)
        target = tl.where(more, tl.load(save_slots + i, mask=more, other=0).to(tl.int64), slot)
        last = tl.maximum(stop - 1, first)
        rows = tl.minimum(row + group, last).to(tl.int64)
        u_t, dt_t = load(u_at + rows * u_stride, inside), load(dt_at + rows * dt_stride, inside)
        z_t = load(z_at + rows * z_stride, inside)
        b_t = vectors(b + s, b_stride, row, last, inside_s, GROUP)
        c_t = vectors(c + s, c_stride, row, last, inside_s, GROUP)
        for t in range(row, stop, GROUP):
            next_rows = tl.minimum(t + GROUP + group, last).to(tl.int64)
            u_next, dt_next = load(u_at + next_rows * u_stride, inside), load(dt_at + next_rows * dt_stride, inside)
            z_next = load(z_at + next_rows * z_stride, inside)
            b_next = vectors(b + s, b_stride, t + GROUP, last, inside_s, GROUP)
            c_next = vectors(c + s, c_stride, t + GROUP, last, inside_s, GROUP)
            # The rows of the group from row `stop` on get a step size of 0, which leaves the state unchanged. Their
            # products with u and b are zeros, too: zero times a number that is infinite or NaN would be NaN.
            used, read = t + group < stop, tl.zeros((GROUP, BLOCK_D), tl.float32)
            delta = tl.where(used, softplus(dt_t + bias), 0.0)
            drive = tl.where(used, delta * u_t, 0.0)
            for k in tl.static_range(GROUP):
                h = decayed(h, row_of(delta, group, k), row_of(drive, group, k), b_t[k], rate)
                read = tl.where(group == k, tl.sum(h * c_t[k][None, :], axis=1)[None, :], read)
            y = gated(read, u_t, z_t, tl.broadcast_to(skip, read.shape))
            rows = (t + group).to(tl.int64)
            tl.store(
                out + rows * channels + channel[None, :], rounded(y, out.type.element_ty), mask=inside & (rows < stop)
            )
            u_t, dt_t, z_t, b_t, c_t = u_next, dt_next, z_next, b_next, c_next
        row = stop
        if tl.where(more, (saved >= first) & (saved < end), is_last):
            tl.store(ssm_state + target * slot_stride + place, h, mask=inside_state)


@jit
def vectors(
    at: tl.tensor, stride: tl.tensor, row: tl.tensor, last: tl.tensor, mask: tl.tensor, GROUP: tl.constexpr
) -> tl.tuple:
    """Returns the vectors [S] of b or c for GROUP rows, from `row` on. Rows after `last` are replaced by zeros."""
    rows = ()
    for k in tl.static_range(GROUP):
        rows += (load(at + tl.minimum(row + k, last).to(tl.int64) * stride, mask & (row + k <= last)),)
    return rows


@jit
def row_of(tile: tl.tensor, number: tl.tensor, k: tl.constexpr) -> tl.tensor:
    return tl.sum(tl.where(number == k, tile, 0.0), axis=0)


@jit
def state_block(
    channels: tl.tensor, STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Returns the offsets of the program's block [BLOCK_D, BLOCK_S] in a state [channels, STATES], and a mask."""
    channel, s = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    return channel[:, None] * STATES + s[None, :], (channel < channels)[:, None] & (s < STATES)[None, :]


@jit
def load(at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def step(
    h: tl.tensor,
    u: tl.tensor,
    dt: tl.tensor,
    z: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    rate: tl.tensor,
    skip: tl.tensor,
    bias: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """Returns the next state [D, S] and the output y [D] for one token. `rate` is a / ln 2, for `exp2`."""
    delta = softplus(dt + bias)
    h = decayed(h, delta, delta * u, b, rate)
    return h, gated(tl.sum(h * c[None, :], axis=1), u, z, skip)


@jit
def decayed(h: tl.tensor, delta: tl.tensor, drive: tl.tensor, b: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Returns the next state exp(delta * a) * h + drive * b: [D, S]. `rate` is a / ln 2."""
    return tl.fma(tl.exp2(delta[:, None] * rate), h, drive[:, None] * b[None, :])


@jit
def gated(read: tl.tensor, u: tl.tensor, z: tl.tensor, skip: tl.tensor) -> tl.tensor:
    """Returns the output y = (h @ c + d * u) * silu(z). The argument `read` is h @ c, `skip` is d."""
    return tl.fma(skip, u, read) * silu(z)
