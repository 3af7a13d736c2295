"""The selective scan of Mamba-1 (Gu & Dao 2023, Algorithm 2) runs token by token. This table explains the letters.

    letter   paper           here                            shape
    u        x               input of the recurrence         [T, D]
    dt       Delta           step size                       [T, D]
    a        A               decay rates, negative           [D, S]
    b, c     B, C            input and output projections    [T, S]
    d        D               skip connection                 [D]
    z                        gate (figure 3)                 [T, D]
    h        h               state                           [S, D] of each sequence

selective_scan corresponds to selective_scan_fn of the mamba-ssm package, selective_state_update to the function of that
name. Like mamba-ssm, this code discretises A by zero-order hold, exp(dt * a), and B by Euler's rule, dt * b, instead of
the paper's equation 4.

There are two differences from mamba-ssm. The recurrence runs strictly in the order of time instead of as a parallel
scan; only then can a prompt be cut into chunks anywhere without a change of bits. And h has D as its last axis, so that
torch works on long contiguous runs of memory, although slots store [D, S].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import ScanInputs, ScanWeights, Segments
from jamba_server.kernels.reference.exact import ordered_sum, silu, softplus
from jamba_server.kernels.reference.ragged import initial_states, sequence_of_row, state_writes

# The states after this number of rows are computed and kept in memory at the same time. One state is float32 [S, D],
# which takes 512 KiB in the model Jamba Mini.
BLOCK_ROWS = 32


def selective_scan(inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
    """See the protocol `kernels.ops.SelectiveScan` for the arguments and the result."""
    order = _time_order(segments)
    rows, slots = state_writes(segments)
    # ssm_state[slots[j]] must become the state after row rows[j]. writes[j] is the index of that row in `order.rows`.
    writes = order.rows.argsort()[rows]
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
    """See the protocol `kernels.ops.SelectiveStateUpdate` for the arguments and the result."""
    decay, drive = _discretize(inputs, weights)
    h = decay * ssm_state[state_ids].transpose(1, 2) + drive
    ssm_state[state_ids] = h.transpose(1, 2)
    return _read_out(h, inputs, weights)


class _TimeOrder(NamedTuple):
    """Lists the rows of all sequences, ordered by time step. In each step, longer sequences come first.

    The sequences that have a token at step t + 1 are therefore the first of the sequences that have one at step t.
    """

    rows: Tensor  # int64 [T], the row numbers of the batch in the order of time
    sequences: Tensor  # int64 [N], the numbers of the sequences, the longest sequence first
    step_sizes: list[int]  # for each time step, the number of sequences that have a token at this step


def _time_order(segments: Segments) -> _TimeOrder:
    sequence = sequence_of_row(segments)
    step = torch.arange(len(sequence), device=sequence.device) - segments.query_start[sequence]
    sequences = segments.query_start.diff().argsort(descending=True, stable=True)
    rank = sequences.argsort()
    rows = (step * len(sequences) + rank[sequence]).argsort()
    return _TimeOrder(rows, sequences, step.bincount().tolist())


def _blocks(step_sizes: list[int]) -> list[list[int]]:
    """Splits the time steps into blocks of at most BLOCK_ROWS rows.

    A time step with more than BLOCK_ROWS rows becomes a block of its own.
    """
    steps = max(1, BLOCK_ROWS // step_sizes[0])
    return [step_sizes[start : start + steps] for start in range(0, len(step_sizes), steps)]


def _discretize(inputs: ScanInputs, weights: ScanWeights) -> tuple[Tensor, Tensor]:
    """Returns (exp(dt * a), (dt * u) * b), both float32 [T, S, D].

    A token changes the state h to exp(dt * a) * h + (dt * u) * b.
    """
    dt = softplus(inputs.dt.float() + weights.dt_bias)
    decay = torch.exp(dt[:, None, :] * weights.a.t().contiguous())
    drive = (dt * inputs.u.float())[:, None, :] * inputs.b.float()[:, :, None]
    return decay, drive


def _run(h: Tensor, decay: Tensor, drive: Tensor, sizes: list[int]) -> Tensor:
    """Returns the state after each row of a block, float32 [rows, S, D].

    h [sequences, S, D] is the state before the block's first step; `sizes` has the number of rows of each step.
    """
    states = torch.empty_like(decay)
    end = 0
    for size in sizes:
        begin, end = end, end + size
        h = torch.mul(decay[begin:end], h[:size], out=states[begin:end]).add_(drive[begin:end])
    return states


def _read_out(h: Tensor, inputs: ScanInputs, weights: ScanWeights) -> Tensor:
    """Returns y = (h @ c + d * u) * silu(z) in the inputs' dtype [T, D]. h: float32 [T, S, D]."""
    y = ordered_sum(h * inputs.c.float()[:, :, None], dim=1).squeeze(1) + weights.d * inputs.u.float()
    return (y * silu(inputs.z.float())).to(inputs.u.dtype)
