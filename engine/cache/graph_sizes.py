"""The class `GraphSizes`: decides for which batch sizes (in rows) and context lengths (in tokens) steps are captured as
graphs, and estimates the memory of these graphs. Works without torch."""

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

# The numbers of prompt tokens and of prompts for which steps that also compute prompts are captured on a GPU. With more
# tokens, the kernels run longer than the host needs to launch them. At least one prompt of such a graph is padding. On
# every device, each prompt of a graph may save at most SAVES_PER_PROMPT states.
MIXED_TOKENS, MIXED_PROMPTS, SAVES_PER_PROMPT = (64, 128, 256, 512, 1024), (2, 4, 8, 16), 4
# The numbers of rows that decode in such a step. They are fewer than those of pure decode steps, because there are also
# several numbers of tokens and of prompts.
MIXED_ROWS = (0, 8, 16, 32, 64, 128, 192, 256, 384, 512)
MAX_MIXED_GRAPHS = 64  # beyond this number, further sizes of such steps run without a graph
# On a CPU, the graph of a step with prompts has exactly the step's rows and sequences, because the time of a step
# depends on its rows. In steps with more than CPU_MIXED_TOKENS rows, the Python code that a graph saves takes a few
# percent of the time. Such a graph takes about 300 bytes for each of several hundred calls. The graph that was used
# least recently makes room for a new one.
CPU_MIXED_TOKENS, CPU_MIXED_GRAPHS = 512, 256
# The largest size of the page tables of all sequences that may run. Larger tables do not stay on the GPU, but are sent
# with each step.
MAX_TABLE_BYTES = 1024**3


class GraphKey(NamedTuple):
    """The size of a graph: its number of rows that decode, including padding rows, and the longest context, in tokens,
    that fits into its page tables. If the step also computes prompts, `tokens` is the number of their rows and
    `prompts` the number of prompts, both including padding. On a CPU, replies in such a step count as prompts of one
    token, and `rows` is 0."""

    rows: int
    context: int
    tokens: int = 0
    prompts: int = 0


class GraphSizes:
    """The sizes of the graphs. For each number of rows there are graphs for a few context lengths; the longest context
    has `max_model_len` tokens. On a GPU the numbers of rows are 1, 2, 4, then multiples of 8, up to the smaller of
    `max_num_seqs` and MAX_ROWS. Few numbers of rows are enough on a GPU, because padding rows cost almost nothing
    there. On a CPU there is a graph for every number of rows, because capturing a graph is fast there. `mixed` says
    whether there are graphs of steps with prompts."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: str, *, mixed: bool = True) -> None:
        self.on_cpu = on_cpu = device == "cpu"
        self._mixed = mixed
        self.most_mixed = CPU_MIXED_GRAPHS if on_cpu else MAX_MIXED_GRAPHS
        first, factor = (CPU_FIRST_CONTEXT, CPU_CONTEXT_FACTOR) if on_cpu else (FIRST_CONTEXT, CONTEXT_FACTOR)
        self.contexts, self._max_tokens = [first], CPU_MAX_TOKENS if on_cpu else None
        highest = min(max_num_seqs, MAX_ROWS)
        ladder = [*(rows for rows in (1, 2, 4) if rows < highest), *range(8, highest, 8), highest]
        self.rows = list(range(1, highest + 1)) if on_cpu else ladder
        while self.contexts[-1] < max_model_len:
            self.contexts.append(self.contexts[-1] * factor)
        self.contexts[-1] = max_model_len
        # `highest` takes the place of all numbers that are not smaller
        self._mixed_rows = [*(rows for rows in MIXED_ROWS if rows < highest), highest]

    def key(self, rows: int, context: int) -> GraphKey | None:
        """Returns the size of the smallest graph that can run `rows` sequences of at most `context` tokens each.
        Returns None if steps of this size run without a graph."""
        if rows > self.rows[-1]:
            return None
        rows, context = self.rows[bisect_left(self.rows, rows)], self.contexts[bisect_left(self.contexts, context)]
        return GraphKey(rows, context) if self._max_tokens is None or rows * context <= self._max_tokens else None

    def mixed_key(self, rows: int, context: int, tokens: int, prompts: int) -> GraphKey | None:
        """Returns the size of the smallest graph that can run a step of `rows` sequences that decode and `prompts`
        prompts with `tokens` tokens in all, where no sequence has more than `context` tokens. Returns None if steps of
        this size run without a graph.

        On a GPU, a graph has at least one prompt more than the step. Each prompt that is padding has at least one
        token. On a CPU there is no padding.
        """
        if not self._mixed:
            return None
        context = self.contexts[bisect_left(self.contexts, context)]
        if self.on_cpu:
            tokens, prompts = tokens + rows, prompts + rows
            fits = tokens <= CPU_MIXED_TOKENS and tokens * context <= CPU_MAX_TOKENS
            return GraphKey(0, context, tokens, prompts) if fits else None
        count = next((number for number in MIXED_PROMPTS if number > prompts), None)
        if rows > self._mixed_rows[-1] or count is None:
            return None
        size = next((number for number in MIXED_TOKENS if number >= tokens + count - prompts), None)
        if size is None or size > context:
            return None  # a padding prompt must fit into the page tables
        return GraphKey(self._mixed_rows[bisect_left(self._mixed_rows, rows)], context, size, count)

    @property
    def keys(self) -> list[GraphKey]:
        """Returns the sizes (rows and context) of all graphs that the engine is allowed to capture."""
        keys = (self.key(rows, context) for rows in self.rows for context in self.contexts)
        return [key for key in keys if key is not None]

    def input_bytes(self, block_size: int, *, sends_tables: bool = True) -> int:
        """Returns the size in bytes of all input arrays of the graph whose input arrays are largest. Each array is
        aligned to 16 bytes. If the page tables stay on the device, a row has the number of its table instead."""
        alignment = 16 * 16
        tables = [(k.rows, 4 * -(-k.context // block_size) if sends_tables else 8) for k in self.keys]
        most = max((rows * (ROW_BYTES + table) + alignment for rows, table in tables), default=0)
        if not self._mixed:
            return most
        # The bytes of a prompt: its state slot, context length, start, has_state and start of saves, and then the row
        # and slot of each state that it may save.
        each = 4 + 4 + 4 + 1 + 4 + SAVES_PER_PROMPT * 8
        if self.on_cpu:
            # Every sequence has a row, and the number of rows limits the length of the page tables.
            entries = CPU_MAX_TOKENS // block_size + CPU_MIXED_TOKENS
            return max(most, CPU_MIXED_TOKENS * (3 * 8 + each) + 4 * entries + 2 * 4 + alignment)
        prompts, context = MIXED_PROMPTS[-1], self.contexts[-1]
        table = 4 * -(-context // block_size) if sends_tables else 8
        return most + MIXED_TOKENS[-1] * 3 * 8 + prompts * (each + table) + 2 * 4

    @property
    def activation_rows(self) -> int:
        """Returns the largest number of rows of a graph."""
        return self.rows[-1] + (MIXED_TOKENS[-1] if self._mixed else 0)

    def graph_bytes(self, bytes_per_row: int) -> int:
        """Returns the number of bytes that all graphs of a GPU need together. The graphs share one memory pool for
        activations. A forward pass uses `bytes_per_row` bytes of this pool for each row."""
        count = len(self.keys) + (MAX_MIXED_GRAPHS if self._mixed else 0)
        return count * BYTES_PER_GRAPH + self.activation_rows * bytes_per_row + ATTENTION_BYTES


def table_bytes(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Returns the size in bytes of the page tables that stay on a GPU, or 0 if they would be larger than
    MAX_TABLE_BYTES. There is one table more than sequences, for padding."""
    size = 4 * (max_num_seqs + 1) * -(-max_model_len // block_size)
    return size if size <= MAX_TABLE_BYTES else 0
