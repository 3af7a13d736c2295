"""The class `DeviceTables`: page tables that stay on a GPU, so that a step sends only what has changed in them.

The page table of a context of 256K tokens has 64 KiB. A step of 256 such sequences would build and send 16 MiB on the
host, which takes longer than the step takes on the GPU. What changes in a step are a few pages: a sequence that decodes
gets one page in every `block_size` steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.staging import Array


class TableChanges(NamedTuple):
    """What to write into the tables: `pages`, int32 [n], are written to the places `places`, int64 [n], which count
    through all rows of the tables."""

    places: Array
    pages: Array


class _Known(NamedTuple):
    """What a row of the tables has: the first `num_pages` pages of the array `block_ids`. A sequence gets a new array
    when it gets other pages, and the array only grows while it has these pages."""

    row: int
    block_ids: array[int]
    num_pages: int


class DeviceTables:
    """The page tables of running sequences, int32 [max_num_seqs + 1, max_blocks]. Row 0 is all zeros: the table of
    padding, and of sequences that own no pages. Entries after a sequence's last page are 0.

    Steps that were launched before may still read the tables while a later step's changes are prepared, because the
    device works in the order of the launches.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self._known: dict[Sequence, _Known] = {}
        self._free = list(range(max_num_seqs, 0, -1))
        self._filled = [0] * (max_num_seqs + 1)  # how many entries of each row may differ from 0
        self._is_stale = False  # whether changes were returned that the device never got

    def update(self, chunks: Many[Chunk]) -> TableChanges:
        """Gives each sequence of a step a row, and returns what must be written before the step reads the tables."""
        if self._is_stale:
            self._start_anew()
        elif len(self._known) > len(chunks):
            self._forget_ended()
        width = self.tables.shape[1]
        places: list[Array] = []
        pages: list[Array] = []
        for chunk in chunks:
            seq = chunk.sequence
            known, block_ids = self._known.get(seq), seq.block_ids
            if known is not None and known.block_ids is block_ids and known.num_pages == len(block_ids):
                continue  # the usual case: the sequence has no new page
            if not seq.state_id:
                continue  # a dummy sequence, whose pages are all page 0
            same = known is not None and known.block_ids is block_ids
            row = known.row if known is not None else self._take_row(chunks)
            start = known.num_pages if same and known is not None else 0
            new = np.asarray(block_ids[start:], dtype=np.int32)
            cleared = max(0, self._filled[row] - len(block_ids))
            places.append(np.arange(len(new) + cleared) + (row * width + start))
            pages.append(np.concatenate([new, np.zeros(cleared, dtype=np.int32)]) if cleared else new)
            self._known[seq], self._filled[row] = _Known(row, block_ids, len(block_ids)), len(block_ids)
        if not places:
            return TableChanges(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32))
        return TableChanges(np.concatenate(places), np.concatenate(pages))

    def invalidate(self) -> None:
        """Must be called if a step fails after `update`. The next `update` then returns whole tables."""
        self._is_stale = True

    def apply(self, places: Tensor, pages: Tensor) -> None:
        """Launches the write of `TableChanges`, whose arrays have been copied to the device."""
        if len(places):
            self.tables.view(-1).index_copy_(0, places, pages)

    def rows(self, chunks: Many[Chunk], count: int) -> Array:
        """Returns the rows of the chunks' sequences, int64 [count], after `update`. Rows of padding follow."""
        rows = np.zeros(count, dtype=np.int64)
        for i, chunk in enumerate(chunks):
            if chunk.sequence.state_id:
                rows[i] = self._known[chunk.sequence].row
        return rows

    def gather(self, rows: Tensor, max_blocks: int) -> Tensor:
        """Returns the first `max_blocks` entries of the given rows, int32 [len(rows), max_blocks]."""
        return self.tables[:, :max_blocks].index_select(0, rows)

    def _take_row(self, chunks: Many[Chunk]) -> int:
        if not self._free:
            self._forget_ended()
        assert self._free, f"a step of {len(chunks)} chunks has more sequences than there are tables"
        return self._free.pop()

    def _start_anew(self) -> None:
        self.tables.zero_()
        self._known.clear()
        self._free = list(range(len(self.tables) - 1, 0, -1))
        self._filled = [0] * len(self.tables)
        self._is_stale = False

    def _forget_ended(self) -> None:
        """Frees the rows of sequences that do not run any more. A sequence that waits has no pages."""
        for seq in [seq for seq in self._known if not seq.state_id]:
            self._free.append(self._known.pop(seq).row)
