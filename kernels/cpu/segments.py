"""Functions that convert `kernels.ops.Segments` to arguments of the library (`src/segments.h`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jamba_server.kernels.cpu.library import INT, POINTER
from jamba_server.kernels.ops import Segments

SEGMENTS = (INT, *[POINTER] * 6)
"""The types of the arguments that `ragged` and `one_row_each` return."""


def ragged(segments: Segments) -> tuple[Any, ...]:
    """Returns `segments` as arguments. They have the addresses of its tensors, which must live until the call ends."""
    saves = segments.saves
    return (
        segments.state_ids.shape[0],
        segments.query_start.data_ptr(),
        segments.state_ids.data_ptr(),
        segments.has_state.data_ptr(),
        saves.start.data_ptr(),
        saves.rows.data_ptr(),
        saves.slots.data_ptr(),
    )


def one_row_each(state_ids: Tensor) -> tuple[Any, ...]:
    """Returns the arguments for one row of each sequence, where every sequence has a state."""
    return state_ids.shape[0], None, state_ids.data_ptr(), None, None, None, None
