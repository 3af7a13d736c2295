"""ForwardBatch: everything one forward pass needs to know about its tokens, built whole, then read-only."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.staging import Array, upload
from jamba_server.kernels.ops import Pages, Segments, StateSaves


class PageTables(NamedTuple):
    """Which pages some sequences own: int32 block_tables [N, max_blocks], context_lens [N], and a number that none of
    these exceeds."""

    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int

    def pages(self, k: Tensor, v: Tensor) -> Pages:
        """These tables over one layer's K and V pages."""
        return Pages(k, v, self.block_tables, self.context_lens, self.max_context_len)


class Decodes(NamedTuple):
    """Single tokens of sequences that have a state: state ids int32 [N], and the pages."""

    state_ids: Tensor
    tables: PageTables


class Prefills(NamedTuple):
    """Longer runs and first tokens, their rows counted from the first of them, and the pages."""

    segments: Segments
    tables: PageTables


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """T tokens of several sequences in one ragged row: `num_decodes` rows of `decodes`, then those of `prefills`; each
    is None if there are none.

    token_ids int64 [T]; kv_slots int64 [T] (page * block_size + offset); logit_rows int64: rows whose logits are
    wanted.
    """

    token_ids: Tensor
    kv_slots: Tensor
    logit_rows: Tensor
    num_decodes: int
    decodes: Decodes | None
    prefills: Prefills | None


class RowArrays(NamedTuple):
    """Of every token: its id (0 for one that is ahead) and its kv slot."""

    token_ids: Array
    kv_slots: Array


class TableArrays(NamedTuple):
    """Of every sequence: state id, page table, context length."""

    state_ids: Array
    block_tables: Array
    context_lens: Array


class SegmentArrays(NamedTuple):
    """Of every run, as in `Segments` and `StateSaves`."""

    query_start: Array
    save_start: Array
    save_rows: Array
    save_slots: Array
    has_state: Array


class SampledTokens:
    """Tokens of the last step that sampled some, on the device: the host may not know them yet.

    ids: int64 [max_num_seqs].
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows: dict[Sequence, int] = {}

    def put(self, tokens: Tensor, sequences: Many[Sequence]) -> None:
        """tokens: int64 [n], the next of each of `sequences`."""
        self.ids[: len(tokens)].copy_(tokens)
        self._rows = {seq: row for row, seq in enumerate(sequences)}

    def sources(self, chunks: Many[Chunk], rows: int) -> Array:
        """int64 [rows]: where in `ids` followed by the step's own token ids each row's token is. The chunks' rows come
        first."""
        sources = np.arange(len(self.ids), len(self.ids) + rows)
        for row, chunk in enumerate(chunks):
            if chunk.is_ahead:
                sources[row] = self._rows[chunk.sequence]
        return sources

    def fill(self, token_ids: Tensor, sources: Tensor) -> Tensor:
        """The step's token ids, those that the host does not know put in."""
        return torch.cat((self.ids, token_ids)).index_select(0, sources)


def build_batch(
    chunks: Many[Chunk], *, block_size: int, device: torch.device, sampled: SampledTokens | None = None
) -> ForwardBatch:
    """The batch of one step's chunks, decodes first; a logit row for each token that is chosen, in their order. Chunks
    that are ahead find their tokens in `sampled`."""
    num_decodes = sum(chunk.is_decode for chunk in chunks)
    decodes, prefills = chunks[:num_decodes], chunks[num_decodes:]
    assert all(chunk.is_decode for chunk in decodes), "decodes come first"
    rows = row_arrays(chunks, block_size)
    arrays: list[Array] = [*rows, _logit_rows(chunks)]
    if decodes:
        arrays += table_arrays(decodes, block_size, len(decodes), longest(decodes))
    if prefills:
        arrays += table_arrays(prefills, block_size, len(prefills), longest(prefills))
        arrays += _segment_arrays(prefills)
    if sampled is not None:
        arrays.append(sampled.sources(decodes, len(rows.token_ids)))
    tensors = iter(upload(arrays, device))
    token_ids, kv_slots, logit_rows = next(tensors), next(tensors), next(tensors)
    decode_part = _decodes(decodes, tensors) if decodes else None
    prefill_part = _prefills(prefills, tensors) if prefills else None
    return ForwardBatch(
        token_ids=token_ids if sampled is None else sampled.fill(token_ids, next(tensors)),
        kv_slots=kv_slots,
        logit_rows=logit_rows,
        num_decodes=num_decodes,
        decodes=decode_part,
        prefills=prefill_part,
    )


def _logit_rows(chunks: Many[Chunk]) -> Array:
    rows, row = array("q"), 0
    for chunk in chunks:
        row += chunk.end - chunk.start
        if chunk.num_sampled:
            rows.extend(range(row - chunk.num_sampled, row))
    return np.asarray(rows)


def longest(chunks: Many[Chunk]) -> int:
    """Tokens of the longest context."""
    return max(chunk.end for chunk in chunks)


def row_arrays(chunks: Many[Chunk], block_size: int, *, padding: int = 0) -> RowArrays:
    """Those of all chunks, one after the other. Padding writes to page 0, which is nobody's."""
    token_ids, kv_slots = array("q"), array("q")
    for chunk in chunks:
        tokens = chunk.sequence.tokens
        token_ids += tokens[chunk.start : chunk.end]
        if chunk.end > len(tokens):  # it is ahead
            token_ids.append(0)
        _add_kv_slots(kv_slots, chunk, block_size)
    if padding:
        token_ids.extend([0] * padding)
        kv_slots.extend([0] * padding)
    return RowArrays(np.asarray(token_ids), np.asarray(kv_slots))


def table_arrays(chunks: Many[Chunk], block_size: int, rows: int, max_context_len: int) -> TableArrays:
    """With page tables for `max_context_len` tokens. Rows beyond the chunks are padding: one token in page 0 upon state
    0, which are nobody's."""
    padding = rows - len(chunks)
    tables = np.zeros((rows, -(-max_context_len // block_size)), dtype=np.int32)
    for row, chunk in zip(tables, chunks, strict=False):
        used = -(-chunk.end // block_size)
        row[:used] = chunk.sequence.block_ids[:used]
    state_ids = array("i", [chunk.sequence.state_id for chunk in chunks])
    context_lens = array("i", [chunk.end for chunk in chunks])
    if padding:
        state_ids.extend([0] * padding)
        context_lens.extend([1] * padding)
    return TableArrays(np.asarray(state_ids), tables, np.asarray(context_lens))


def _decodes(chunks: Many[Chunk], tensors: Iterator[Tensor]) -> Decodes:
    """Of what `table_arrays` made."""
    state_ids, block_tables, context_lens = next(tensors), next(tensors), next(tensors)
    return Decodes(state_ids, PageTables(block_tables, context_lens, longest(chunks)))


def _add_kv_slots(kv_slots: array[int], chunk: Chunk, block_size: int) -> None:
    block_ids, first = chunk.sequence.block_ids, chunk.start // block_size
    if chunk.end - chunk.start == 1:
        kv_slots.append(block_ids[first] * block_size + chunk.start % block_size)
        return
    positions = np.arange(chunk.start, chunk.end)
    blocks = np.asarray(block_ids[first : -(-chunk.end // block_size)], dtype=np.int64)
    kv_slots.frombytes((blocks[positions // block_size - first] * block_size + positions % block_size).tobytes())


def _segment_arrays(chunks: Many[Chunk]) -> SegmentArrays:
    query_start, save_start, rows, slots = [0], [0], list[int](), list[int]()
    for chunk in chunks:
        rows += [query_start[-1] + save.position - chunk.start - 1 for save in chunk.saves]
        slots += [save.slot for save in chunk.saves]
        save_start.append(len(rows))
        query_start.append(query_start[-1] + chunk.end - chunk.start)
    has_state = np.array([chunk.start > 0 for chunk in chunks], dtype=np.bool_)
    starts, saves, at, to = (np.array(values, dtype=np.int32) for values in (query_start, save_start, rows, slots))
    return SegmentArrays(starts, saves, at, to, has_state)


def _prefills(chunks: Many[Chunk], tensors: Iterator[Tensor]) -> Prefills:
    """Of what `table_arrays` and `_segment_arrays` made."""
    state_ids, tables = _decodes(chunks, tensors)
    query_start, save_start, rows, slots, has_state = (next(tensors) for _ in range(5))
    segments = Segments(
        query_start=query_start,
        max_query_len=max(chunk.end - chunk.start for chunk in chunks),
        state_ids=state_ids,
        has_state=has_state,
        saves=StateSaves(save_start, rows, slots),
    )
    return Prefills(segments, tables)
