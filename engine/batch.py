"""ForwardBatch: the tokens of a forward pass, the cache pages for their keys and values, and the state slots of their
sequences. A ForwardBatch is read-only."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.staging import Array, upload
from jamba_server.kernels.ops import Pages, Segments, StateSaves


class PageTables(NamedTuple):
    """The page tables of N sequences. `block_tables`, int32 [N, max_blocks], has one row for each sequence. The row has
    the ids of the sequence's cache pages, in the order of the sequence's tokens. `context_lens`, int32 [N], are the
    numbers of tokens in the sequences, and `max_context_len` is at least the largest of these numbers."""

    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int

    def pages(self, k: Tensor, v: Tensor) -> Pages:
        """Returns these tables together with the K and V pages of one layer."""
        return Pages(k, v, self.block_tables, self.context_lens, self.max_context_len)


class Decodes(NamedTuple):
    """The N decoding sequences of a batch. A decoding sequence has one token in the batch. A state slot has the
    sequence's Mamba state after all tokens that precede this token. The field `state_ids`, int32 [N], has the ids of
    these state slots."""

    state_ids: Tensor
    tables: PageTables


class Prefills(NamedTuple):
    """The prefilling sequences of a batch. A sequence counts as prefilling in three cases: the batch contains several
    tokens of the sequence; the batch contains the first token of the sequence; or the sequence's Mamba state is to be
    saved after one of the batch's tokens. Row numbers in the field `segments` count from the first row of the first
    prefilling sequence."""

    segments: Segments
    tables: PageTables


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """A batch of T tokens of several sequences, with one row for each token. The first `num_decodes` rows are the
    tokens of the decoding sequences (`decodes`), and the following rows are the tokens of the prefilling sequences
    (`prefills`). The field `decodes` is None if no sequence decodes, and the field `prefills` is None if no sequence
    prefills.

    `token_ids` are int64 [T]. `kv_slots`, int64 [T], say where each token's keys and values are stored: page id *
    block_size + offset in the page. `logit_rows`, int64, are the rows whose logits are needed.
    """

    token_ids: Tensor
    kv_slots: Tensor
    logit_rows: Tensor
    num_decodes: int
    decodes: Decodes | None
    prefills: Prefills | None


class RowArrays(NamedTuple):
    """Arrays with one entry for each token of a batch: the token's id (0 if the id is still known only to the device),
    and the place of the token's key and value in the cache (see `ForwardBatch.kv_slots`)."""

    token_ids: Array
    kv_slots: Array


class TableArrays(NamedTuple):
    """Arrays with one row for each sequence: its state slot, its page table, and its context length in tokens. Where
    the page tables stay on the device (`DeviceTables`), `block_tables` has the number of the sequence's row there."""

    state_ids: Array
    block_tables: Array
    context_lens: Array


class SegmentArrays(NamedTuple):
    """The arrays from which the function `_prefills` makes the structs `Segments` and `StateSaves` of the prefilling
    sequences."""

    query_start: Array
    save_start: Array
    save_rows: Array
    save_slots: Array
    has_state: Array


class SampledTokens:
    """The tokens that the most recent sampling step chose. The tokens stay on the device, because the next step may be
    launched before the host has read these tokens. The attribute `ids`, int64 [max_num_seqs], has the token ids.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows: dict[Sequence, int] = {}

    def put(self, tokens: Tensor, sequences: Many[Sequence]) -> None:
        """Stores the sampled token ids `tokens`, int64 [n]. The argument `sequences` has the sequence of each token."""
        self.ids[: len(tokens)].copy_(tokens)
        self._rows = {seq: row for row, seq in enumerate(sequences)}

    def sources(self, chunks: Many[Chunk], rows: int) -> Array:
        """Returns where each of the `rows` rows of a step finds its token id, as an int64 array.

        An index below len(ids) refers to the attribute `ids`, which has tokens that only the device knows. A larger
        index refers to the token ids that the host knows. Chunk i of `chunks` has one token, which is row i. All other
        rows take a token id that the host knows.
        """
        sources = np.arange(len(self.ids), len(self.ids) + rows)
        for row, chunk in enumerate(chunks):
            if chunk.is_ahead:
                sources[row] = self._rows[chunk.sequence]
        return sources

    def fill(self, token_ids: Tensor, sources: Tensor) -> Tensor:
        """Returns the token ids of a step. The argument `token_ids` has the token ids that the host knows, and the
        attribute `ids` has the token ids that only the device knows. The argument `sources` is the result of the method
        `sources`: for each row of the step, the index of the row's token id."""
        return torch.cat((self.ids, token_ids)).index_select(0, sources)


def build_batch(
    chunks: Many[Chunk],
    *,
    block_size: int,
    device: torch.device,
    sampled: SampledTokens | None = None,
    tables: DeviceTables | None = None,
) -> ForwardBatch:
    """Returns the batch for the chunks of a step. Chunks that decode must come before all other chunks. The result's
    field `logit_rows` has one row number for each token that the step samples, in the order of the chunks. Token ids
    that the host does not know yet are taken from the argument `sampled`. If there are `tables`, the page tables are
    taken from them, and only their changes are sent to the device."""
    num_decodes = sum(chunk.is_decode for chunk in chunks)
    decodes, prefills = chunks[:num_decodes], chunks[num_decodes:]
    assert all(chunk.is_decode for chunk in decodes), "a chunk that prefills precedes one that decodes"
    rows = row_arrays(chunks, block_size)
    arrays: list[Array] = [*rows, logit_rows(chunks)]
    if tables is not None:
        arrays += tables.update(chunks)
    if decodes:
        arrays += table_arrays(decodes, block_size, len(decodes), longest(decodes), tables)
    if prefills:
        arrays += table_arrays(prefills, block_size, len(prefills), longest(prefills), tables)
        arrays += segment_arrays(prefills)
    if sampled is not None:
        arrays.append(sampled.sources(decodes, len(rows.token_ids)))
    tensors = iter(upload(arrays, device))
    token_ids, kv_slots, sampling_rows = next(tensors), next(tensors), next(tensors)
    if tables is not None:
        tables.apply(next(tensors), next(tensors))
    gather = TableGather(tables, block_size)
    decode_part = decodes_of(tensors, longest(decodes), gather) if decodes else None
    prefill_part = prefills_of(tensors, longest(prefills), _longest_query(prefills), gather) if prefills else None
    return ForwardBatch(
        token_ids=token_ids if sampled is None else sampled.fill(token_ids, next(tensors)),
        kv_slots=kv_slots,
        logit_rows=sampling_rows,
        num_decodes=num_decodes,
        decodes=decode_part,
        prefills=prefill_part,
    )


def logit_rows(chunks: Many[Chunk], *, padding: int = 0) -> Array:
    """Returns the rows of a batch from which tokens are sampled. `padding` rows follow those of the chunks that
    decode."""
    rows, row = array("q"), 0
    for chunk in chunks:
        row += chunk.end - chunk.start
        if chunk.num_sampled:
            first = row if chunk.is_decode else row + padding
            rows.extend(range(first - chunk.num_sampled, first))
    return np.asarray(rows)


def _longest_query(chunks: Many[Chunk]) -> int:
    return max(chunk.end - chunk.start for chunk in chunks)


def longest(chunks: Many[Chunk]) -> int:
    """Returns the largest context length in tokens among the chunks' sequences. A context ends where the chunk ends."""
    return max(chunk.end for chunk in chunks)


def row_arrays(chunks: Many[Chunk], block_size: int, *, padding: int = 0) -> RowArrays:
    """Returns the arrays for the tokens of all chunks in order. Adds `padding` rows that write to page 0, which no
    sequence owns."""
    token_ids, kv_slots = array("q"), array("q")
    for chunk in chunks:
        tokens = chunk.sequence.tokens
        token_ids += tokens[chunk.start : chunk.end]
        if chunk.end > len(tokens):
            token_ids.append(0)  # a placeholder for a token id that the host does not know yet
        _add_kv_slots(kv_slots, chunk, block_size)
    if padding:
        token_ids.extend([0] * padding)
        kv_slots.extend([0] * padding)
    return RowArrays(np.asarray(token_ids), np.asarray(kv_slots))


def table_arrays(
    chunks: Many[Chunk], block_size: int, rows: int, max_context_len: int, on_device: DeviceTables | None = None
) -> TableArrays:
    """Returns the arrays of the chunks' sequences, with page tables for `max_context_len` tokens, or with the rows of
    the tables `on_device`. The arrays have `rows` rows. Each row after the last chunk is padding. A padding row
    describes a sequence of one token in page 0 with state slot 0. No real sequence owns page 0 or slot 0."""
    padding = rows - len(chunks)
    if on_device is not None:
        tables = on_device.rows(chunks, rows)
    else:
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


class TableGather(NamedTuple):
    """Makes the page tables of a step from the uploaded array `TableArrays.block_tables`."""

    on_device: DeviceTables | None
    block_size: int

    def __call__(self, uploaded: Tensor, max_context_len: int) -> Tensor:
        if self.on_device is None:
            return uploaded
        return self.on_device.gather(uploaded, -(-max_context_len // self.block_size))


def decodes_of(tensors: Iterator[Tensor], max_context_len: int, gather: TableGather) -> Decodes:
    """Returns the struct `Decodes` of a batch. The next tensors of the iterator `tensors` must be the uploaded arrays
    that the function `table_arrays` returned."""
    state_ids, block_tables, context_lens = next(tensors), next(tensors), next(tensors)
    return Decodes(state_ids, PageTables(gather(block_tables, max_context_len), context_lens, max_context_len))


def _add_kv_slots(kv_slots: array[int], chunk: Chunk, block_size: int) -> None:
    block_ids, first = chunk.sequence.block_ids, chunk.start // block_size
    if chunk.end - chunk.start == 1:
        kv_slots.append(block_ids[first] * block_size + chunk.start % block_size)
        return
    positions = np.arange(chunk.start, chunk.end)
    blocks = np.asarray(block_ids[first : -(-chunk.end // block_size)], dtype=np.int64)
    kv_slots.frombytes((blocks[positions // block_size - first] * block_size + positions % block_size).tobytes())


def segment_arrays(chunks: Many[Chunk]) -> SegmentArrays:
    """Returns the arrays of chunks that prefill."""
    query_start, save_start, rows, slots = [0], [0], list[int](), list[int]()
    for chunk in chunks:
        rows += [query_start[-1] + save.position - chunk.start - 1 for save in chunk.saves]
        slots += [save.slot for save in chunk.saves]
        save_start.append(len(rows))
        query_start.append(query_start[-1] + chunk.end - chunk.start)
    has_state = np.array([chunk.start > 0 for chunk in chunks], dtype=np.bool_)
    starts, saves, at, to = (np.array(values, dtype=np.int32) for values in (query_start, save_start, rows, slots))
    return SegmentArrays(starts, saves, at, to, has_state)


def prefills_of(tensors: Iterator[Tensor], max_context_len: int, max_query_len: int, gather: TableGather) -> Prefills:
    """Returns the struct `Prefills` of a batch. The next tensors of the iterator `tensors` must be the uploaded arrays
    that the function `table_arrays` returned, followed by those that the function `segment_arrays` returned. The two
    lengths are at least those of the longest context and of the longest chunk."""
    state_ids, tables = decodes_of(tensors, max_context_len, gather)
    query_start, save_start, rows, slots, has_state = (next(tensors) for _ in range(5))
    segments = Segments(
        query_start=query_start,
        max_query_len=max_query_len,
        state_ids=state_ids,
        has_state=has_state,
        saves=StateSaves(save_start, rows, slots),
    )
    return Prefills(segments, tables)
