"""These functions convert `kernels.ops.Segments` to arguments of the compiled library (`src/segments.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import whole
from jamba_server.kernels.cpu.library import INT, POINTER
from jamba_server.kernels.ops import Segments

SEGMENTS = (INT, *[POINTER] * 6)
"""The types of the arguments that `ragged` and `one_row_each` return."""


def ragged(segments: Segments) -> tuple[Any, ...]:
    """Returns the arguments that describe `segments` to a function of the library.

    `segments` must stay alive until the library's function returns.
    """
    saves, sequences, num_saves = segments.saves, segments.state_ids.shape[0], segments.saves.rows.shape[0]
    whole("segments.query_start", segments.query_start, torch.int32, (sequences + 1,))
    whole("segments.state_ids", segments.state_ids, torch.int32, (sequences,))
    whole("segments.has_state", segments.has_state, torch.bool, (sequences,))
    whole("segments.saves.start", saves.start, torch.int32, (sequences + 1,))
    whole("segments.saves.rows", saves.rows, torch.int32, (num_saves,))
    whole("segments.saves.slots", saves.slots, torch.int32, (num_saves,))
    return (
        sequences,
        segments.query_start.data_ptr(),
        segments.state_ids.data_ptr(),
        segments.has_state.data_ptr(),
        saves.start.data_ptr(),
        saves.rows.data_ptr(),
        saves.slots.data_ptr(),
    )


def one_row_each(state_ids: Tensor, x: Tensor) -> tuple[Any, ...]:
    """Returns the same arguments as `ragged`, for a batch of sequences with one row of x and a stored state each."""
    whole("state_ids", state_ids, torch.int32, (x.shape[0],))
    return state_ids.shape[0], None, state_ids.data_ptr(), None, None, None, None
