"""The selective scan: a few channels of one sequence a program, with their state in registers from token to token.

The order is that of time, so a chunk may end anywhere. Blocks of channels are narrow so that one long prompt still
makes some hundreds of programs; the next token's inputs are fetched while the current one is computed.
"""

# What the compiler knows of a kernel, the type checker does not.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from kernels.ops import ScanInputs, ScanWeights, Segments
from kernels.triton.launch import EXACT, LOG2_E, cdiv, jit, next_power_of_2, rounded, silu, softplus

BLOCK_CHANNELS = 16
OPTIONS: dict[str, Any] = EXACT | {"num_warps": 1}


def selective_scan(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    """See `kernels.ops.SelectiveScan`."""
    ragged = (segments.query_start, segments.state_ids, segments.has_state, *segments.saves)
    return _launch(inputs, weights, ssm_state, ragged, decode=False)


def selective_state_update(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
    """See `kernels.ops.SelectiveStateUpdate`."""
    return _launch(inputs, weights, ssm_state, (state_ids,) * 6, decode=True)


def _launch(
    inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, ragged: tuple[Tensor, ...], *, decode: bool
) -> Tensor:
    channels, states = weights.a.shape
    assert all(rows.stride(1) == 1 for rows in inputs) and ssm_state.stride()[1:] == (states, 1)
    out = inputs.u.new_empty(inputs.u.shape[0], channels)
    scan_kernel[(cdiv(channels, BLOCK_CHANNELS), len(ragged[1]))](
        *inputs,
        *(weight.contiguous() for weight in weights),
        ssm_state,
        out,
        *ragged,
        channels,
        *(rows.stride(0) for rows in inputs),
        ssm_state.stride(0),
        STATES=states,
        BLOCK_D=BLOCK_CHANNELS,
        BLOCK_S=next_power_of_2(states),
        DECODE=decode,
        **OPTIONS,
    )
    return out


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
    BLOCK_S: tl.constexpr, DECODE: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (cdiv(channels, BLOCK_D), sequences). DECODE: row i is sequence i's only one, and all have a state."""
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
        channels, u_stride, dt_stride, b_stride, c_stride, z_stride, slot_stride, STATES, BLOCK_D, BLOCK_S,
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
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
) -> None:  # fmt: skip
    """Rows `row` to `end` of a sequence from the state h [D, S] on. Of its saves `save` to `last_save` those at these
    rows are written, and, where they are its last rows, the final state into `slot`."""
    first = row
    channel, s = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside, inside_s = channel < channels, s < STATES
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    rate = tl.load(a + place, mask=inside_state, other=0.0) * LOG2_E
    skip, bias = tl.load(d + channel, mask=inside, other=0.0), tl.load(dt_bias + channel, mask=inside, other=0.0)
    at = row.to(tl.int64)
    u_at, dt_at, z_at = u + at * u_stride + channel, dt + at * dt_stride + channel, z + at * z_stride + channel
    b_at, c_at, out_at = b + at * b_stride + s, c + at * c_stride + s, out + at * channels + channel
    u_t, dt_t, z_t = load(u_at, inside), load(dt_at, inside), load(z_at, inside)
    b_t, c_t = load(b_at, inside_s), load(c_at, inside_s)
    # from one state to write to the next; the last of them is the final one
    for i in range(save, last_save + 1):
        more = i < last_save
        saved = tl.load(save_rows + i, mask=more, other=0)
        stop = tl.where(more, tl.minimum(tl.maximum(saved + 1, first), end), end)
        target = tl.where(more, tl.load(save_slots + i, mask=more, other=0).to(tl.int64), slot)
        for t in range(row, stop):
            ahead = tl.where(t + 1 < end, 1, 0).to(tl.int64)
            u_at, dt_at, z_at = u_at + ahead * u_stride, dt_at + ahead * dt_stride, z_at + ahead * z_stride
            b_at, c_at = b_at + ahead * b_stride, c_at + ahead * c_stride
            u_next, dt_next, z_next = load(u_at, inside), load(dt_at, inside), load(z_at, inside)
            b_next, c_next = load(b_at, inside_s), load(c_at, inside_s)
            h, y = step(h, u_t, dt_t, z_t, b_t, c_t, rate, skip, bias)
            tl.store(out_at, rounded(y, out.type.element_ty), mask=inside)
            out_at += channels
            u_t, dt_t, z_t, b_t, c_t = u_next, dt_next, z_next, b_next, c_next
        row = stop
        if tl.where(more, (saved >= first) & (saved < end), is_last):
            tl.store(ssm_state + target * slot_stride + place, h, mask=inside_state)


@jit
def state_block(
    channels: tl.tensor, STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Where in a state [channels, STATES] the program's block [BLOCK_D, BLOCK_S] is, and which of it exists."""
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
    """The next state [D, S] and y [D]; `rate` is a in units of log 2."""
    dt = softplus(dt + bias)
    h = tl.fma(tl.exp2(dt[:, None] * rate), h, (dt * u)[:, None] * b[None, :])
    y = tl.fma(skip, u, tl.sum(h * c[None, :], axis=1))
    return h, y * silu(z)
