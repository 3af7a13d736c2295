"""This selective scan splits long prompts into chunks, so that even a few prompts give enough programs for a GPU.

It has two levels. A prompt is cut into chunks of CHUNK tokens. First, all chunks are scanned in parallel from a zero
state. A chunk multiplies each number of its initial state by exp(a * sum of dt), so the initial state of every chunk
then follows chunk by chunk. Last, all chunks are scanned again from their initial states, for their outputs. The chunks
are counted from the first token of this step, so the last bits of results depend on chunked prefill.
The last bits also differ from those of `scan`'s results.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import ScanInputs, ScanWeights, Segments
from jamba_server.kernels.triton import scan
from jamba_server.kernels.triton.launch import LOG2_E, cdiv, follow, jit, next_power_of_2, softplus
from jamba_server.kernels.triton.scan import (
    GROUP,
    OPTIONS,
    SCHEDULERS,
    decayed,
    load,
    row_of,
    state_block,
    vectors,
    walk,
)

CHUNK = 256  # The number of tokens in a chunk, a multiple of GROUP.
# The chunked scan is used only if the longest prompt has at least this number of chunks. Otherwise all prompts are
# scanned sequentially.
MIN_CHUNKS = 4
BLOCK_CHANNELS = 16  # The number of channels that a program scans.


def selective_scan(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    """Implements the protocol `SelectiveScan`, which is documented in the module `kernels.ops`."""
    rows, channels = inputs.u.shape
    if not pays(rows, segments.max_query_len, channels):
        return scan.selective_scan(inputs, weights, ssm_state, segments)
    return _chunked(inputs, weights, ssm_state, segments)


def pays(rows: int, longest: int, channels: int) -> bool:
    """Returns whether the chunked scan is expected to be faster than the sequential scan.

    Two levels execute 1.6 times as many instructions (counted, not timed), but only CHUNK tokens follow each other.
    This pays where the sequential scan would have fewer warps than the GPU has schedulers. The number of warps is
    estimated as if all prompts were as long as the longest. The answer depends on shapes only, so it is the same on
    every GPU.
    """
    warps = cdiv(channels, BLOCK_CHANNELS) * rows // longest
    return longest >= MIN_CHUNKS * CHUNK and warps < SCHEDULERS


def _chunked(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    (rows, channels), states = inputs.u.shape, weights.a.shape[1]
    for name, part in zip(ScanInputs._fields, inputs, strict=True):
        require(part.stride(1) == 1, name, part, "have contiguous rows")
    require(ssm_state.stride()[1:] == (states, 1), "ssm_state", ssm_state, "have contiguous slots of [D, S]")
    sequences = len(segments.state_ids)
    blocks, chunks = cdiv(channels, BLOCK_CHANNELS), cdiv(segments.max_query_len, CHUNK)
    # The tensor `starts` holds the initial state of every chunk of every sequence. The function `place_of` defines the
    # index of a sequence's first chunk.
    starts = torch.empty(rows // CHUNK + sequences, channels, states, device=ssm_state.device)
    times = starts.new_empty(starts.shape[:2])
    out = inputs.u.new_empty(rows, channels)
    a, d, dt_bias = (weight.contiguous() for weight in weights)
    u, dt, b, c, z = inputs
    strides = [part.stride(0) for part in inputs]
    sizes = {"STATES": states, "BLOCK_D": BLOCK_CHANNELS, "BLOCK_S": next_power_of_2(states), "CHUNK": CHUNK}
    known = (segments.query_start, segments.state_ids, segments.has_state)
    chunk_kernel[(blocks, chunks - 1, sequences)](
        u,
        dt,
        b,
        a,
        dt_bias,
        starts,
        times,
        segments.query_start,
        channels,
        *strides[:3],
        GROUP=GROUP,
        **sizes,
        **OPTIONS,
    )
    start_kernel[(blocks, sequences)](
        a, starts, times, ssm_state, *known, channels, ssm_state.stride(0), **sizes, **OPTIONS
    )
    output_kernel[(blocks, chunks, sequences)](
        *(u, dt, b, c, z, a, d, dt_bias, starts, ssm_state, out, *known[:2], *segments.saves),
        *(channels, *strides, ssm_state.stride(0)),
        GROUP=GROUP,
        **sizes,
        **OPTIONS,
    )
    return out


@jit
def place_of(start: tl.tensor, sequence: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """Returns the index of a sequence's first chunk in the tensors `starts` and `times`.

    `start` is the sequence's first row. The places leave enough room for the chunks of the sequences before it,
    whatever their lengths.
    """
    return (start // CHUNK + sequence).to(tl.int64)


@jit
def chunk_kernel(
    u: tl.tensor, dt: tl.tensor, b: tl.tensor, a: tl.tensor, dt_bias: tl.tensor,
    starts: tl.tensor, times: tl.tensor, query_start: tl.tensor,
    channels: tl.tensor, u_stride: tl.tensor, dt_stride: tl.tensor, b_stride: tl.tensor,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Scans one chunk, starting from a zero state. Writes the chunk's final state and the sum of its step sizes dt.

    The final state is written to `starts` at the place of the next chunk, the sum of dt to `times` at the chunk's own
    place. The grid is (cdiv(channels, BLOCK_D), chunks of the longest sequence minus 1, sequences), because the last
    chunk of a sequence has no successor.
    """
    follow()
    chunk, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    row = start + chunk * CHUNK
    if row + CHUNK >= tl.load(query_start + sequence + 1):
        return
    channel, s, group = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S), tl.arange(0, GROUP)
    inside, inside_s, group = (channel < channels)[None, :], s < STATES, group[:, None]
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    rate = tl.load(a + place, mask=inside_state, other=0.0) * LOG2_E
    bias = tl.load(dt_bias + channel, mask=channel < channels, other=0.0)[None, :]
    last, rows = row + CHUNK - 1, (row + group).to(tl.int64)
    u_at, dt_at = u + channel[None, :] + rows * u_stride, dt + channel[None, :] + rows * dt_stride
    u_t, dt_t = load(u_at, inside), load(dt_at, inside)
    b_t = vectors(b + s, b_stride, row, last, inside_s, GROUP)
    h, time = tl.zeros((BLOCK_D, BLOCK_S), tl.float32), tl.zeros((GROUP, BLOCK_D), tl.float32)
    for t in range(row, row + CHUNK, GROUP):
        ahead = tl.where(t + GROUP <= last, GROUP, 0).to(tl.int64)
        u_at, dt_at = u_at + ahead * u_stride, dt_at + ahead * dt_stride
        u_next, dt_next = load(u_at, inside), load(dt_at, inside)
        b_next = vectors(b + s, b_stride, t + GROUP, last, inside_s, GROUP)
        delta = softplus(dt_t + bias)
        drive = delta * u_t
        for k in tl.static_range(GROUP):
            h = decayed(h, row_of(delta, group, k), row_of(drive, group, k), b_t[k], rate)
        time += delta
        u_t, dt_t, b_t = u_next, dt_next, b_next
    own = place_of(start, sequence, CHUNK) + chunk
    tl.store(times + own * channels + channel, tl.sum(time, axis=0), mask=channel < channels)
    tl.store(starts + (own + 1) * channels * STATES + place, h, mask=inside_state)


@jit
def start_kernel(
    a: tl.tensor, starts: tl.tensor, times: tl.tensor, ssm_state: tl.tensor,
    query_start: tl.tensor, state_ids: tl.tensor, has_state: tl.tensor,
    channels: tl.tensor, slot_stride: tl.tensor,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Computes the initial state of each chunk of a sequence. The grid is (cdiv(channels, BLOCK_D), sequences).

    On entry, a chunk's place in `starts` holds the final state of the previous chunk, scanned from zeros. On return, it
    holds the chunk's initial state.
    """
    follow()
    sequence = tl.program_id(1)
    start, end = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    rate = tl.load(a + place, mask=inside_state, other=0.0) * LOG2_E
    slot = tl.load(state_ids + sequence).to(tl.int64)
    h = tl.load(ssm_state + slot * slot_stride + place, mask=inside_state, other=0.0)
    h = tl.where(tl.load(has_state + sequence) != 0, h, 0.0)
    first = place_of(start, sequence, CHUNK)
    at, time_at = starts + first * channels * STATES + place, times + first * channels + channel
    tl.store(at, h, mask=inside_state)
    for _ in range(start + CHUNK, end, CHUNK):
        at += channels * STATES
        decay = tl.exp2(load(time_at, channel < channels)[:, None] * rate)
        h = tl.fma(decay, h, tl.load(at, mask=inside_state, other=0.0))
        tl.store(at, h, mask=inside_state)
        time_at += channels


@jit
def output_kernel(
    u: tl.tensor, dt: tl.tensor, b: tl.tensor, c: tl.tensor, z: tl.tensor,
    a: tl.tensor, d: tl.tensor, dt_bias: tl.tensor,
    starts: tl.tensor, ssm_state: tl.tensor, out: tl.tensor,
    query_start: tl.tensor, state_ids: tl.tensor,
    save_start: tl.tensor, save_rows: tl.tensor, save_slots: tl.tensor,
    channels: tl.tensor,
    u_stride: tl.tensor, dt_stride: tl.tensor, b_stride: tl.tensor, c_stride: tl.tensor, z_stride: tl.tensor,
    slot_stride: tl.tensor,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Scans one chunk from its initial state and writes the outputs and the states to save.

    The grid is (cdiv(channels, BLOCK_D), chunks of the longest sequence, sequences).
    """
    follow()
    chunk, sequence = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
    row = start + chunk * CHUNK
    if row >= end:
        return
    place, inside_state = state_block(channels, STATES, BLOCK_D, BLOCK_S)
    own = place_of(start, sequence, CHUNK) + chunk
    h = tl.load(starts + own * channels * STATES + place, mask=inside_state, other=0.0)
    slot = tl.load(state_ids + sequence).to(tl.int64)
    walk(
        h, row, tl.minimum(row + CHUNK, end), u, dt, b, c, z, a, d, dt_bias, ssm_state, out, slot, row + CHUNK >= end,
        tl.load(save_start + sequence), tl.load(save_start + sequence + 1), save_rows, save_slots,
        channels, u_stride, dt_stride, b_stride, c_stride, z_stride, slot_stride, STATES, BLOCK_D, BLOCK_S, GROUP,
    )  # fmt: skip
