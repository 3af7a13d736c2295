"""The selective scan of Mamba-1 (Gu & Dao 2023, Algorithm 2), token by token.

    letter   paper           here                            shape
    u        x               input of the recurrence         [T, D]
    dt       Delta           step size                       [T, D]
    a        A               decay rates, negative           [D, S]
    b, c     B, C            input and output projections    [T, S]
    d        D               skip connection                 [D]
    z                        gate (figure 3)                 [T, D]
    h        h               state                           [S, D] of each sequence

selective_scan corresponds to selective_scan_fn of the mamba-ssm package, selective_state_update to the function of that
name. As there, A is discretised by zero-order hold, exp(dt * a), and B by Euler's rule, dt * b, instead of the paper's
equation 4: its own code does so, for A is the term that matters.

Deviations: the recurrence runs strictly in order of time instead of as a parallel scan, because only then can it be cut
anywhere without changing a bit; and h has D as its last axis, so that torch works on long contiguous runs (slots store
[D, S]).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import ScanInputs, ScanWeights, Segments
from jamba_server.kernels.reference.exact import ordered_sum, silu, softplus
from jamba_server.kernels.reference.ragged import initial_states, sequence_of_row, state_writes

BLOCK_ROWS = 32  # [S, D] float32 tensors are made for so many rows at a time: 512 KiB each for Jamba Mini


def selective_scan(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    """See `kernels.ops.SelectiveScan`."""
    order = _time_order(segments)
    rows, slots = state_writes(segments)
    writes = order.rows.argsort()[rows]  # the place in time order of each row whose state is written
    h = initial_states(ssm_state, segments)[order.sequences].transpose(1, 2)
    y = torch.empty_like(inputs.u)
    end = 0
    for sizes in _blocks(order.step_sizes):
        begin, end = end, end + sum(sizes)
        block = order.rows[begin:end]
        taken = ScanInputs(*(tensor[block] for tensor in inputs))
        states = _run(h, *_discretize(taken, weights), sizes)
        h = states[len(states) - sizes[-1] :]
        y[block] = _read_out(states, taken, weights)
        here = (writes >= begin) & (writes < end)
        ssm_state[slots[here]] = states[writes[here] - begin].transpose(1, 2)
    return y


def selective_state_update(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
    """See `kernels.ops.SelectiveStateUpdate`."""
    decay, drive = _discretize(inputs, weights)
    h = decay * ssm_state[state_ids].transpose(1, 2) + drive
    ssm_state[state_ids] = h.transpose(1, 2)
    return _read_out(h, inputs, weights)


class _TimeOrder(NamedTuple):
    """The rows of all sequences by time step, and within a step by sequence, the longest first.

    Sequences end from the back then: those still running at a step are a prefix of those at the step before.
    """

    rows: Tensor  # int64 [T]
    sequences: Tensor  # int64 [N], the longest first
    step_sizes: list[int]  # how many sequences have a token at each step, never increasing


def _time_order(segments: Segments) -> _TimeOrder:
    sequence = sequence_of_row(segments)
    step = torch.arange(len(sequence), device=sequence.device) - segments.query_start[sequence]
    sequences = segments.query_start.diff().argsort(descending=True, stable=True)
    rank = sequences.argsort()
    rows = (step * len(sequences) + rank[sequence]).argsort()
    return _TimeOrder(rows, sequences, step.bincount().tolist())


def _blocks(step_sizes: list[int]) -> list[list[int]]:
    """The steps in groups of at most BLOCK_ROWS rows, or of one step."""
    steps = max(1, BLOCK_ROWS // step_sizes[0])
    return [step_sizes[start : start + steps] for start in range(0, len(step_sizes), steps)]


def _discretize(inputs: ScanInputs, weights: ScanWeights) -> tuple[Tensor, Tensor]:
    """exp(dt * a) and (dt * u) * b, both float32 [T, S, D]."""
    dt = softplus(inputs.dt.float() + weights.dt_bias)
    decay = torch.exp(dt[:, None, :] * weights.a.t().contiguous())
    drive = (dt * inputs.u.float())[:, None, :] * inputs.b.float()[:, :, None]
    return decay, drive


def _run(h: Tensor, decay: Tensor, drive: Tensor, sizes: list[int]) -> Tensor:
    """The state after every row of a block, float32 [rows, S, D], from h [sequences, S, D] before its first step."""
    states = torch.empty_like(decay)
    end = 0
    for size in sizes:
        begin, end = end, end + size
        h = torch.mul(decay[begin:end], h[:size], out=states[begin:end]).add_(drive[begin:end])
    return states


def _read_out(h: Tensor, inputs: ScanInputs, weights: ScanWeights) -> Tensor:
    """(h @ c + d * u) * silu(z). h: float32 [T, S, D]. Returns the inputs' dtype [T, D]."""
    y = ordered_sum(h * inputs.c.float()[:, :, None], dim=1).squeeze(1) + weights.d * inputs.u.float()
    return (y * silu(inputs.z.float())).to(inputs.u.dtype)
