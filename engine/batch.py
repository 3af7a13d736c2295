"""ForwardBatch: everything one forward pass needs to know about its tokens, built whole, then read-only."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.scheduler import Chunk
from kernels.ops import Pages, Segments, StateSaves


class PageTables(NamedTuple):
    """Which pages some sequences own: int32 block_tables [N, max_blocks], context_lens [N], and the largest of
    these."""

    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int

    def pages(self, k: Tensor, v: Tensor) -> Pages:
        """These tables over one layer's K and V pages."""
        return Pages(k, v, self.block_tables, self.context_lens, self.max_context_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """T tokens of several sequences in one ragged row.

    Rows [0, num_decodes) are single tokens of sequences that have a state: `decode_state_ids` (int32) and
    `decode_tables` belong to them. The rest are longer runs or first tokens: `prefill` describes them with row numbers
    counted from num_decodes, `prefill_tables` holds their pages; both are None if there are none.
    token_ids int64 [T]; kv_slots int64 [T] (page * block_size + offset); logit_rows int64: rows whose logits are
    wanted.
    """

    token_ids: Tensor
    kv_slots: Tensor
    logit_rows: Tensor
    num_decodes: int
    decode_state_ids: Tensor
    decode_tables: PageTables | None
    prefill: Segments | None
    prefill_tables: PageTables | None


def build_batch(chunks: Many[Chunk], *, block_size: int, device: torch.device) -> ForwardBatch:
    """The batch of one step's chunks, decodes first; one logit row for each chunk that samples, in their order."""

    num_decodes = sum(chunk.is_decode for chunk in chunks)
    decodes, prefills = chunks[:num_decodes], chunks[num_decodes:]
    assert all(chunk.is_decode for chunk in decodes), "decodes come first"
    token_ids, kv_slots, logit_rows = array("q"), array("q"), array("q")
    for chunk in chunks:
        token_ids += chunk.sequence.tokens[chunk.start : chunk.end]
        _add_kv_slots(kv_slots, chunk, block_size)
        if chunk.samples:
            logit_rows.append(len(token_ids) - 1)
    return ForwardBatch(
        token_ids=_tensor(token_ids, device),
        kv_slots=_tensor(kv_slots, device),
        logit_rows=_tensor(logit_rows, device),
        num_decodes=num_decodes,
        decode_state_ids=_tensor(array("i", [chunk.sequence.state_id for chunk in decodes]), device),
        decode_tables=_page_tables(decodes, block_size, device) if decodes else None,
        prefill=_segments(prefills, device) if prefills else None,
        prefill_tables=_page_tables(prefills, block_size, device) if prefills else None,
    )


def _tensor(values: array[int], device: torch.device) -> Tensor:
    """On a CPU it is the array's own memory. "q" becomes int64, "i" int32."""
    return torch.from_numpy(np.asarray(values)).to(device, non_blocking=True)


def _add_kv_slots(kv_slots: array[int], chunk: Chunk, block_size: int) -> None:
    block_ids, first = chunk.sequence.block_ids, chunk.start // block_size
    if chunk.end - chunk.start == 1:
        kv_slots.append(block_ids[first] * block_size + chunk.start % block_size)
        return
    positions = np.arange(chunk.start, chunk.end)
    blocks = np.asarray(block_ids[first : -(-chunk.end // block_size)], dtype=np.int64)
    kv_slots.frombytes((blocks[positions // block_size - first] * block_size + positions % block_size).tobytes())


def _page_tables(chunks: Many[Chunk], block_size: int, device: torch.device) -> PageTables:
    longest = max(chunk.end for chunk in chunks)
    tables = np.zeros((len(chunks), -(-longest // block_size)), dtype=np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        used = -(-chunk.end // block_size)
        row[:used] = chunk.sequence.block_ids[:used]
    lens = array("i", [chunk.end for chunk in chunks])
    return PageTables(torch.from_numpy(tables).to(device), _tensor(lens, device), longest)


def _segments(chunks: Many[Chunk], device: torch.device) -> Segments:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    query_start, save_start, rows, slots = [0], [0], list[int](), list[int]()
    for chunk in chunks:
        rows += [query_start[-1] + save.position - chunk.start - 1 for save in chunk.saves]
        slots += [save.slot for save in chunk.saves]
        save_start.append(len(rows))
        query_start.append(query_start[-1] + chunk.end - chunk.start)
    return Segments(
        query_start=tensor(query_start),
        max_query_len=max(chunk.end - chunk.start for chunk in chunks),
        state_ids=tensor([chunk.sequence.state_id for chunk in chunks]),
        has_state=torch.tensor([chunk.start > 0 for chunk in chunks], dtype=torch.bool, device=device),
        saves=StateSaves(tensor(save_start), tensor(rows), tensor(slots)),
    )
