"""GraphSizes: for which numbers of rows and contexts there are graphs of decoding steps, and what they take.
No torch."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

MAX_ROWS = 512  # larger batches keep the device busy for longer than their launches take
# Empty splits of the longest context cost a GPU's graph little, so few contexts do. On a CPU attention's partial
# results take memory for rows times context, which are limited: steps beyond are long anyway.
FIRST_CONTEXT, CONTEXT_FACTOR = 2048, 4
CPU_FIRST_CONTEXT, CPU_CONTEXT_FACTOR, CPU_MAX_TOKENS = 512, 2, 1024**2
BYTES_PER_GRAPH = 4 * 1024**2  # an estimate: some hundred kernels and their arguments
ROW_BYTES = 3 * 8 + 2 * 4  # token id, kv slot and source; state id and context length
ATTENTION_BYTES = 64 * 1024**2  # of partial results on a GPU, which takes as many rows at a time as fit


class GraphKey(NamedTuple):
    """Rows, padding included, and the longest context that there is room for."""

    rows: int
    context: int


class GraphSizes:
    """For each number of rows a few contexts, the last of `max_model_len`. On a GPU rows are 1, 2, 4, then in steps of
    8 up to `max_num_seqs` or MAX_ROWS: padding costs it next to nothing. On a CPU, where a graph is soon made, any
    number is."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: str) -> None:
        on_cpu = device == "cpu"
        first, factor = (CPU_FIRST_CONTEXT, CPU_CONTEXT_FACTOR) if on_cpu else (FIRST_CONTEXT, CONTEXT_FACTOR)
        self.contexts, self._max_tokens = [first], CPU_MAX_TOKENS if on_cpu else None
        highest = min(max_num_seqs, MAX_ROWS)
        ladder = [*(rows for rows in (1, 2, 4) if rows < highest), *range(8, highest, 8), highest]
        self.rows = list(range(1, highest + 1)) if on_cpu else ladder
        while self.contexts[-1] < max_model_len:
            self.contexts.append(self.contexts[-1] * factor)
        self.contexts[-1] = max_model_len

    def key(self, rows: int, context: int) -> GraphKey | None:
        """The smallest graph for so many sequences, the longest of which has `context` tokens; None if none is kept."""
        if rows > self.rows[-1]:
            return None
        rows, context = self.rows[bisect_left(self.rows, rows)], self.contexts[bisect_left(self.contexts, context)]
        return GraphKey(rows, context) if self._max_tokens is None or rows * context <= self._max_tokens else None

    @property
    def keys(self) -> list[GraphKey]:
        """Of all graphs that there may be."""
        keys = (self.key(rows, context) for rows in self.rows for context in self.contexts)
        return [key for key in keys if key is not None]

    def input_bytes(self, block_size: int) -> int:
        """Of the arrays of the largest, each aligned."""
        alignment = 6 * 16
        return max((k.rows * (ROW_BYTES + 4 * -(-k.context // block_size)) + alignment for k in self.keys), default=0)

    def graph_bytes(self, bytes_per_row: int) -> int:
        """What all of a GPU's take, their memory being one: `bytes_per_row` of a forward pass."""
        return len(self.keys) * BYTES_PER_GRAPH + self.rows[-1] * bytes_per_row + ATTENTION_BYTES
