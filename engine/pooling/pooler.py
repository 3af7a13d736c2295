"""The class `Pooler` computes the vectors that requests ask for from the hidden states of a step."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from jamba_server.engine.config import PROMPT_LOGITS_ROWS
from jamba_server.engine.models import Model
from jamba_server.engine.pooling.sums import Sums, fraction_bits, launch_sums, mean_of
from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.staging import HostCopy, upload


class PendingVector(Protocol):
    def read(self) -> bytes | None:
        """Waits until the device has computed what a chunk adds to its request's vector. Returns the vector if the
        chunk is the last one of its request, otherwise None. Chunks must be read in the order in which they were
        launched."""
        ...


class Pooler:
    """Makes the vectors of requests that ask for one.

    A vector may need the hidden states of several chunks. Their parts are kept on the host until the last chunk is
    read. They are dropped together with their sequence, however the sequence ends.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bits = fraction_bits(model.config.max_position_embeddings)
        self._sums: WeakKeyDictionary[Sequence, Sums] = WeakKeyDictionary()
        self._logprobs: WeakKeyDictionary[Sequence, dict[int, list[float]]] = WeakKeyDictionary()

    @property
    def num_kept(self) -> int:
        """Returns for how many sequences parts of vectors are kept."""
        return len(self._sums) + len(self._logprobs)

    def launch(self, chunks: Many[Chunk], hidden: Tensor) -> dict[int, PendingVector]:
        """Launches the computation of vectors from the hidden states, [T, H], of all rows of a step. Returns a dict
        from the index of a chunk to what the chunk adds to its request's vector. The dict has only chunks that add
        something."""
        if all(chunk.num_sampled for chunk in chunks):
            return {}  # the usual step: every chunk samples a token, and requests for vectors sample none
        pending: dict[int, PendingVector] = {}
        row = 0
        last: list[tuple[int, Chunk, int]] = []  # the index of a chunk, the chunk, and the row of its last token
        for i, chunk in enumerate(chunks):
            end = row + chunk.end - chunk.start
            request, length = chunk.sequence.request, chunk.sequence.num_prompt
            if request.kind == "embed" and request.pooling == "mean":
                sums = HostCopy(launch_sums(hidden[row:end], self._bits))
                pending[i] = _Mean(chunk, sums, self._sums, self._bits)
            elif request.kind in ("embed", "classify") and chunk.end == length:
                last.append((i, chunk, end - 1))
            elif request.kind == "score" and (part := _targets(chunk)):
                tables = tuple(self._launch_logprobs(hidden[row:end], chunk, part))
                pending[i] = _Logprobs(chunk, tables, self._logprobs)
            row = end
        return pending | self._launch_last(last, hidden)

    def _launch_last(self, last: Many[tuple[int, Chunk, int]], hidden: Tensor) -> dict[int, PendingVector]:
        pending: dict[int, PendingVector] = {}
        for kind in ("embed", "classify"):
            members = [(i, row) for i, chunk, row in last if chunk.sequence.kind == kind]
            if not members:
                continue
            [rows] = upload([np.array([row for _, row in members], dtype=np.int64)], hidden.device)
            chosen = hidden.index_select(0, rows)
            table = HostCopy(self._model.logits(chosen) if kind == "classify" else chosen.float())
            pending |= {i: _Row(table, number) for number, (i, _) in enumerate(members)}
        return pending

    def _launch_logprobs(
        self, hidden: Tensor, chunk: Chunk, targets: dict[int, tuple[int, ...]]
    ) -> Iterator[tuple[dict[int, tuple[int, ...]], HostCopy]]:
        """Yields the positions of some targets, with their token ids, and the log-probabilities of these ids."""
        positions = list(targets)
        for first in range(0, len(positions), PROMPT_LOGITS_ROWS):
            part = {position: targets[position] for position in positions[first : first + PROMPT_LOGITS_ROWS]}
            rows = [number for number, ids in enumerate(part.values()) for _ in ids]
            ids = [token_id for ids in part.values() for token_id in ids]
            where, which = upload([np.array(values, dtype=np.int64) for values in (rows, ids)], hidden.device)
            begin = positions[first] - chunk.start
            logits = self._model.logits(hidden[begin : begin + len(part)])
            yield part, HostCopy(logits.log_softmax(dim=-1)[where, which])


def _targets(chunk: Chunk) -> dict[int, tuple[int, ...]]:
    """Returns the targets of those positions that the chunk computes."""
    targets, length = chunk.sequence.request.targets, chunk.sequence.num_prompt
    first = length - len(targets)
    positions = range(max(chunk.start, first), min(chunk.end, length))
    return {position: targets[position - first] for position in positions}


@dataclass(frozen=True, slots=True)
class _Row:
    """A vector that is one row of a table."""

    table: HostCopy
    number: int

    def read(self) -> bytes:
        return self.table.numpy()[self.number].astype("<f4").tobytes()


@dataclass(frozen=True, slots=True)
class _Mean:
    chunk: Chunk
    part: HostCopy
    sums: WeakKeyDictionary[Sequence, Sums]
    bits: int

    def read(self) -> bytes | None:
        chunk, sums = self.chunk, self.part.numpy()
        if chunk.start:  # the prompt is always computed from its beginning, also after a preemption
            sums = self.sums[chunk.sequence] + sums
        if chunk.end < chunk.sequence.num_prompt:
            self.sums[chunk.sequence] = sums
            return None
        return mean_of(sums, chunk.sequence.num_prompt, self.bits)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    chunk: Chunk
    tables: tuple[tuple[dict[int, tuple[int, ...]], HostCopy], ...]
    found: WeakKeyDictionary[Sequence, dict[int, list[float]]]

    def read(self) -> bytes | None:
        seq = self.chunk.sequence
        # A preempted sequence may compute a position again, with the same result.
        found = self.found.setdefault(seq, {})
        for targets, table in self.tables:
            values = iter(table.tolist())
            found.update({position: [next(values) for _ in ids] for position, ids in targets.items()})
        if self.chunk.end < seq.num_prompt:
            return None
        first = seq.num_prompt - len(seq.request.targets)
        vector = [value for position in range(first, seq.num_prompt) for value in found[position]]
        return np.array(vector, dtype="<f4").tobytes()
