"""The class `GraphSizes`: decides for which batch sizes (in rows) and context lengths (in tokens) decode steps are
captured as graphs, and estimates the memory of these graphs. Works without torch."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

# The largest number of rows of a graph; each row is one sequence or padding. Steps with more rows gain nothing from a
# graph, because the kernels of such steps run longer than the host needs to launch these kernels.
MAX_ROWS = 512
# Graphs are captured for contexts of FIRST_CONTEXT tokens, and then for lengths that grow by the factor CONTEXT_FACTOR.
# Attention divides a context into splits: parts that are computed in parallel. A GPU graph always runs as many splits
# as its longest context needs. Splits without tokens are cheap, so a few context lengths are enough. On a CPU,
# CPU_FIRST_CONTEXT and CPU_CONTEXT_FACTOR replace FIRST_CONTEXT and CONTEXT_FACTOR, and the partial results of
# attention need memory in proportion to rows * context. CPU_MAX_TOKENS limits this product: a step with a larger
# product takes so long that a graph would not make this step faster.
FIRST_CONTEXT, CONTEXT_FACTOR = 2048, 4
CPU_FIRST_CONTEXT, CPU_CONTEXT_FACTOR, CPU_MAX_TOKENS = 512, 2, 1024**2
BYTES_PER_GRAPH = 4 * 1024**2  # an estimate: a GPU graph stores several hundred kernels with their arguments
# The size in bytes of the inputs of one row of a graph, without the row's page table. Three inputs are int64: the token
# id, the place of the token's key and value in the KV pages, and the place from which the token id is read. Two inputs
# are int32: the state slot and the context length.
ROW_BYTES = 3 * 8 + 2 * 4
# The size in bytes of the buffer for partial results of attention on a GPU. This size limits how many rows attention
# processes at once.
ATTENTION_BYTES = 64 * 1024**2


class GraphKey(NamedTuple):
    """The size of a graph: its number of rows including padding rows, and the longest context, in tokens, that fits
    into its page tables."""

    rows: int
    context: int


class GraphSizes:
    """The sizes of the graphs. For each number of rows there are graphs for a few context lengths; the longest context
    has `max_model_len` tokens. On a GPU the numbers of rows are 1, 2, 4, then multiples of 8, up to the smaller of
    `max_num_seqs` and MAX_ROWS. Few numbers of rows are enough on a GPU, because padding rows cost almost nothing
    there. On a CPU there is a graph for every number of rows, because capturing a graph is fast there."""

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
        """Returns the size of the smallest graph that can run `rows` sequences of at most `context` tokens each.
        Returns None if steps of this size run without a graph."""
        if rows > self.rows[-1]:
            return None
        rows, context = self.rows[bisect_left(self.rows, rows)], self.contexts[bisect_left(self.contexts, context)]
        return GraphKey(rows, context) if self._max_tokens is None or rows * context <= self._max_tokens else None

    @property
    def keys(self) -> list[GraphKey]:
        """Returns the sizes (rows and context) of all graphs that the engine is allowed to capture."""
        keys = (self.key(rows, context) for rows in self.rows for context in self.contexts)
        return [key for key in keys if key is not None]

    def input_bytes(self, block_size: int) -> int:
        """Returns the size in bytes of all input arrays of the graph whose input arrays are largest. Each array is
        aligned to 16 bytes."""
        alignment = 6 * 16
        return max((k.rows * (ROW_BYTES + 4 * -(-k.context // block_size)) + alignment for k in self.keys), default=0)

    def graph_bytes(self, bytes_per_row: int) -> int:
        """Returns the number of bytes that all graphs of a GPU need together. The graphs share one memory pool for
        activations. A forward pass uses `bytes_per_row` bytes of this pool for each row."""
        return len(self.keys) * BYTES_PER_GRAPH + self.rows[-1] * bytes_per_row + ATTENTION_BYTES
