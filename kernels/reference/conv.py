"""This module computes the short causal convolution before the scan (Gu & Dao 2023, figure 3), one filter per channel.

causal_conv1d corresponds to causal_conv1d_fn of the causal-conv1d package, causal_conv1d_update to the function of that
name. There are three differences. The sequences of a batch are concatenated instead of padded. Channels are the last
axis, so a Mamba layer transposes nothing. The state holds W-1 inputs, because the oldest of W is never used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import Segments
from jamba_server.kernels.reference.exact import silu
from jamba_server.kernels.reference.ragged import initial_states, sequence_of_row, state_writes


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments) -> Tensor:
    """See the protocol `kernels.ops.CausalConv1d` for the arguments and the result."""
    width = weight.shape[0]
    tokens, sequences = len(x), len(segments.state_ids)
    row = torch.arange(tokens, device=x.device)
    history = torch.arange(width - 1, device=x.device)
    # The tensor `tape` contains for each sequence the width - 1 old inputs from the sequence's state, followed by the
    # sequence's new inputs. Row r of the batch is in sequence number s. The output for row r is computed from `width`
    # inputs, which start at index r + (width - 1) * s of the tape. The state after row r consists of the last width - 1
    # of these `width` inputs.
    window_start = row + (width - 1) * sequence_of_row(segments)
    tape = x.new_empty(tokens + (width - 1) * sequences, x.shape[1])
    first_window = window_start[segments.query_start[:-1]]
    tape[first_window[:, None] + history] = initial_states(conv_state, segments)
    tape[window_start + width - 1] = x
    rows, slots = state_writes(segments)
    conv_state[slots] = tape[window_start[rows][:, None] + 1 + history]
    return _filter([tape[window_start + tap] for tap in range(width)], weight, bias)


def causal_conv1d_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor
) -> Tensor:
    """See the protocol `kernels.ops.CausalConv1dUpdate` for the arguments and the result."""
    window = torch.cat([conv_state[state_ids], x[:, None]], dim=1)
    conv_state[state_ids] = window[:, 1:]
    return _filter(list(window.unbind(1)), weight, bias)


def _filter(inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns silu((sum of inputs[tap] * weight[tap] over the taps) + bias). inputs[tap]: [T, D]; weight[tap]: [D].

    The oldest input is added first. All arithmetic is in float32; the result is rounded to the inputs' dtype.
    """
    total = inputs[0].float() * weight[0].float()
    for taken, tap in zip(inputs[1:], weight[1:], strict=True):
        total = total + taken.float() * tap.float()
    if bias is not None:
        total = total + bias.float()
    return silu(total).to(inputs[0].dtype)
