"""`kernels.ops.Segments` as arguments of the library (`src/segments.h`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jamba_server.kernels.cpu.library import INT, POINTER
from jamba_server.kernels.ops import Segments

SEGMENTS = (INT, *[POINTER] * 6)
"""Types of what `ragged` and `one_row_each` return."""


def ragged(segments: Segments) -> tuple[Any, ...]:
    """All of it; `segments` must outlive the call."""
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
    """One row of each sequence, all of which have a state."""
    return state_ids.shape[0], None, state_ids.data_ptr(), None, None, None, None
