"""These functions find the sequence of each row of a ragged batch, and read and list the sequences' states."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import Segments


def sequence_of_row(segments: Segments) -> Tensor:
    """Returns, for each row, the number of the sequence to which the row belongs: int64 [T]."""
    return torch.repeat_interleave(segments.query_start.diff())


def initial_states(storage: Tensor, segments: Segments) -> Tensor:
    """Returns each sequence's state [N, ...] from `storage` [slots, ...], or zeros where `has_state` is false."""
    has_state = segments.has_state.view(-1, *(1 for _ in storage.shape[1:]))
    return torch.where(has_state, storage[segments.state_ids], 0)


def state_writes(segments: Segments) -> tuple[Tensor, Tensor]:
    """Returns (rows, slots), both int64: the state just after rows[j] must be written to slots[j].

    The states are each sequence's state after its last row, and the states inside chunks that `segments.saves` lists.
    """
    rows = torch.cat([segments.query_start[1:] - 1, segments.saves.rows])
    slots = torch.cat([segments.state_ids, segments.saves.slots])
    return rows.long(), slots.long()
