"""What the rows of a ragged batch need to know of their sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import Segments


def sequence_of_row(segments: Segments) -> Tensor:
    """int64 [T]: the number of the sequence that each row belongs to."""
    return torch.repeat_interleave(segments.query_start.diff())


def initial_states(storage: Tensor, segments: Segments) -> Tensor:
    """[N, ...]: each sequence's state in `storage` [slots, ...], zeros for those without, whatever the slot holds."""
    has_state = segments.has_state.view(-1, *(1 for _ in storage.shape[1:]))
    return torch.where(has_state, storage[segments.state_ids], 0)


def state_writes(segments: Segments) -> tuple[Tensor, Tensor]:
    """(rows, slots), both int64: the state just after rows[j] goes to slots[j].

    A final state is the save after a sequence's last row, so the final and the interior ones are written alike.
    """
    rows = torch.cat([segments.query_start[1:] - 1, segments.saves.rows])
    slots = torch.cat([segments.state_ids, segments.saves.slots])
    return rows.long(), slots.long()
