"""This kernel computes the causal convolution of a Mamba layer.

A program computes a tile: a block of channels for a block of tokens of one sequence.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import Segments
from jamba_server.kernels.triton.launch import EXACT, cdiv, follow, jit, next_power_of_2, rounded, silu

BLOCK_TOKENS, BLOCK_CHANNELS = 16, 128


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments) -> Tensor:
    """Implements the protocol `CausalConv1d`, which is documented in the module `kernels.ops`."""
    ragged = (segments.query_start, segments.state_ids, segments.has_state, *segments.saves)
    return _launch((x, weight, bias, conv_state), ragged, segments.max_query_len)


def causal_conv1d_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor
) -> Tensor:
    """Implements the protocol `CausalConv1dUpdate`, which is documented in the module `kernels.ops`."""
    return _launch((x, weight, bias, conv_state), (state_ids,) * 6, None)


def _launch(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], ragged: tuple[Tensor, ...], max_query_len: int | None
) -> Tensor:
    x, weight, bias, conv_state = tensors
    width, channels = weight.shape
    require(x.stride(1) == 1, "x", x, "have contiguous rows")
    require(weight.is_contiguous(), "weight", weight, "be contiguous")
    require(conv_state.stride()[1:] == (channels, 1), "conv_state", conv_state, "have contiguous slots of [W-1, D]")
    out = x.new_empty(x.shape[0], channels)
    block = 1 if max_query_len is None else BLOCK_TOKENS
    grid = (cdiv(channels, BLOCK_CHANNELS), cdiv(max_query_len or 1, block), len(ragged[1]))
    conv_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        conv_state,
        out,
        *ragged,
        channels,
        x.stride(0),
        conv_state.stride(0),
        WIDTH=width,
        HISTORY=next_power_of_2(max(width - 1, 1)),
        HAS_BIAS=bias is not None,
        BLOCK_T=block,
        BLOCK_D=BLOCK_CHANNELS,
        DECODE=max_query_len is None,
        **EXACT,
    )
    return out


@jit
def conv_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, conv_state: tl.tensor, out: tl.tensor,
    query_start: tl.tensor, state_ids: tl.tensor, has_state: tl.tensor,
    save_start: tl.tensor, save_rows: tl.tensor, save_slots: tl.tensor,
    channels: tl.tensor, x_stride: tl.tensor, slot_stride: tl.tensor,
    WIDTH: tl.constexpr, HISTORY: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, DECODE: tl.constexpr,
) -> None:  # fmt: skip
    """Computes one tile of outputs. The grid is (channel blocks, token blocks of the longest sequence, sequences).

    Only the program of a sequence's first token block reads the inputs stored in the state, so this program can also
    write the new states. BLOCK_T is at least WIDTH - 1, except with DECODE, where row i is the only row of sequence i
    and every sequence has a state.
    """
    follow()
    sequence, block = tl.program_id(2), tl.program_id(1)
    if DECODE:
        start, length, known = sequence, 1, sequence >= 0
    else:
        start = tl.load(query_start + sequence)
        length, known = tl.load(query_start + sequence + 1) - start, tl.load(has_state + sequence) != 0
    if block * BLOCK_T >= length:
        return
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = channel < channels
    slot = conv_state + tl.load(state_ids + sequence).to(tl.int64) * slot_stride + channel
    rows = x + start.to(tl.int64) * x_stride + channel
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tap in tl.static_range(WIDTH):
        taken = read(rows, slot, t + tap - (WIDTH - 1), length, known, x_stride, channels, inside, WIDTH)
        factor = tl.load(weight + tap * channels + channel, mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(taken.to(tl.float32), tl.broadcast_to(factor, total.shape), total)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    at = (start + t).to(tl.int64) * channels + channel
    tl.store(out + at, rounded(silu(total), out.type.element_ty), mask=(t < length) & inside)
    if block > 0:
        return
    old = tl.arange(0, HISTORY)[:, None]
    # All threads must have read the old state before any thread overwrites the old state with the new state.
    final = read(rows, slot, length - (WIDTH - 1) + old, length, known, x_stride, channels, inside, WIDTH)
    if not DECODE:
        for i in range(tl.load(save_start + sequence), tl.load(save_start + sequence + 1)):
            done = tl.load(save_rows + i) + 1 - start
            state = read(rows, slot, done - (WIDTH - 1) + old, length, known, x_stride, channels, inside, WIDTH)
            target = conv_state + tl.load(save_slots + i).to(tl.int64) * slot_stride + channel
            tl.store(target + old * channels, state, mask=(old < WIDTH - 1) & inside)
    tl.debug_barrier()
    tl.store(slot + old * channels, final, mask=(old < WIDTH - 1) & inside)


@jit
def read(
    rows: tl.tensor,
    slot: tl.tensor,
    t: tl.tensor,
    length: tl.tensor,
    known: tl.tensor,
    x_stride: tl.tensor,
    channels: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Returns a tensor [rows, D]: the inputs of a sequence at the token positions `t` [rows, 1] within the sequence.

    Inputs with a negative number come from the sequence's state, or are zeros if it has none.
    """
    new = tl.load(rows + t.to(tl.int64) * x_stride, mask=(t >= 0) & (t < length) & inside, other=0.0)
    old = tl.load(slot + (t + (WIDTH - 1)).to(tl.int64) * channels, mask=(t < 0) & (t >= 1 - WIDTH) & inside, other=0.0)
    return tl.where(t >= 0, new, tl.where(known, old, 0.0))
