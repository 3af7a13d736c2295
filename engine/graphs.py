"""Graphs of steps. A step launches hundreds of kernels, and a graph launches all of these kernels with one call. Graphs
can be used on a GPU and on a CPU.

A graph repeats its kernels with the same addresses and sizes. Three things follow. The inputs of all graphs are in one
buffer, which every step fills anew. On a GPU a batch is padded to the next larger number of rows in a fixed list;
padding rows read and write page 0 and state slot 0, which no sequence owns. A graph's page tables are wide enough for
one of a few context lengths, and a step uses the graph with the shortest length that holds its longest sequence.

There are also graphs of steps that compute a few prompts beside the replies. On a GPU, both the number of prompts and
the number of their rows are padded: padding prompts of one row each follow the real prompts, and the last of them has
all remaining padding rows. On a CPU nothing is padded, and the replies in such a step are computed as prompts of one
token. Their bits are the same, because one kernel computes both there.

A graph is captured when a step first needs it, so that nobody waits for graphs that are never used. On a CPU it is
recorded while that step runs. On a GPU it is captured after that step has run, because by then all kernels are
compiled. The graphs of the shortest contexts are captured before the first request. A step with prompts gets a graph
when it comes for the second time with the same size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.batch import (
    ForwardBatch,
    SampledTokens,
    SegmentArrays,
    TableArrays,
    TableGather,
    decodes_of,
    logit_rows,
    longest,
    prefills_of,
    row_arrays,
    segment_arrays,
    table_arrays,
)
from jamba_server.engine.cache.graph_sizes import (
    BYTES_PER_GRAPH,
    SAVES_PER_PROMPT,
    GraphKey,
    GraphSizes,
)
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.models import Model
from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.staging import Array, cut, pack, packed_bytes, upload

logger = logging.getLogger(__name__)

# Operations that are never part of a decode graph. Graphs can therefore be used with every implementation of these
# operations.
UNCAPTURED_OPS = (
    *("sample", "apply_bitmask", "copy_slots", "compress_states", "restore_states"),
    *("causal_conv1d", "selective_scan", "attention_prefill"),
)
# Operations whose reference implementation reads sizes from device memory and waits for the device to do so. Waiting
# for the device is an error while a CUDA graph is captured.
WAITING_OPS = ("attention_decode", "run_experts", "causal_conv1d_update", "selective_state_update")
# Operations of prompts, and the implementations that can be captured, because they read no size from device memory.
PROMPT_OPS, CAPTURED_NAMES = (
    ("causal_conv1d", "selective_scan", "attention_prefill"),
    ("triton", "triton-chunked", "torch"),
)
# The room, in bytes, for inputs of a step that its graph does not read: the rows from which tokens are sampled, and
# changes of page tables.
EXTRA_BYTES = 64 * 1024
MOST_SEEN = 4096  # the largest number of sizes without a graph that are remembered


class Graph(Protocol):
    """A sequence of kernel launches that is recorded once and then repeated as a whole."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Calls the function `run`, records the kernels that `run` launches, and returns the result of `run`. This
        method executes each recorded kernel exactly once, so the result is valid. A graph can be captured only once."""
        ...

    def replay(self) -> Tensor:
        """Repeats the recorded kernels and returns their result in the tensor that `run` returned during the capture.
        The next replay of any graph may overwrite this tensor."""
        ...


class CudaGraph:
    """A graph on the current CUDA device. Graphs with the same `pool` allocate their tensors in the same memory."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()
        self._output: Tensor | None = None

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        output = run()  # this call compiles missing kernels and computes the step; the capture below only records
        started = time.monotonic()
        # "thread_local" lets other threads compile kernels or allocate memory during the capture.
        try:
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output = run()
        except RuntimeError as error:  # torch's allocator is now in an undefined state, so the engine must end
            raise RuntimeError(
                f"the CUDA graph of {len(output)} rows could not be captured ({error}); --enforce-eager runs "
                "steps without graphs"
            ) from error
        rows, seconds = len(output), time.monotonic() - started
        logger.debug("captured a CUDA graph of %d rows in %.2f s", rows, seconds)
        return output

    def replay(self) -> Tensor:
        assert self._output is not None, "`replay` was called before `capture`"
        self._graph.replay()
        return self._output


def why_no_graphs(names: Mapping[str, str], device: str) -> str | None:
    """Returns None if graphs of decode steps are possible. Otherwise returns a text that names the kernels that cannot
    be captured in a graph. The argument `names` maps each operation to the name of its chosen implementation. On a CPU
    only the implementations with the name "cpu", which are in the compiled library, can be captured."""
    on_cpu = device == "cpu"
    candidates = (op for op in names if op not in UNCAPTURED_OPS) if on_cpu else WAITING_OPS
    ops = [f"{op}={names[op]}" for op in candidates if (names[op] != "cpu" if on_cpu else names[op] == "reference")]
    return f"{', '.join(ops)} cannot be captured" if ops else None


def captures_prompts(names: Mapping[str, str], device: str) -> bool:
    """Returns whether steps that compute prompts can be captured with the chosen kernels, if decode steps can."""
    return all(names[op] in (("cpu",) if device == "cpu" else CAPTURED_NAMES) for op in PROMPT_OPS)


def free_gpu_bytes() -> int:
    """Returns how many bytes the graphs can still allocate: the GPU's free memory, and the memory that torch keeps for
    reuse, because torch returns that memory to the GPU when a capture begins."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


class StepGraphs:
    """The graphs of one model with one cache storage. There is one graph for each size (`GraphKey`).

    If `tables` is given, it has the page tables of all sequences on the device, and a graph gathers the tables of its
    step from it. `free_bytes` returns how many bytes a capture may allocate; a capture needs `bytes_per_row` of them
    for each row.
    """

    def __init__(
        self,
        model: Model,
        storage: CacheStorage,
        *,
        sizes: GraphSizes,
        new_graph: Callable[[], Graph],
        tables: DeviceTables | None = None,
        free_bytes: Callable[[], int] | None = None,
        bytes_per_row: int = 0,
    ) -> None:
        self._model, self._storage, self._sizes, self._new_graph = model, storage, sizes, new_graph
        self._tables, self._free_bytes, self._bytes_per_row = tables, free_bytes, bytes_per_row
        self._graphs: dict[GraphKey, Graph] = {}
        self._seen = set[GraphKey]()  # the sizes of steps with prompts that came once and have no graph
        self._without: set[GraphKey] = set()  # sizes for whose graphs the memory is short
        most = sizes.input_bytes(storage.block_size, sends_tables=tables is None) + EXTRA_BYTES
        self._inputs = torch.empty(most, dtype=torch.uint8, device=storage.kv.device)

    @property
    def captured(self) -> frozenset[GraphKey]:
        """Returns the sizes of all captured graphs."""
        return frozenset(self._graphs)

    def key(self, chunks: Many[Chunk]) -> GraphKey | None:
        """Returns the size of the graph that can run these chunks, or None if no graph can run these chunks."""
        decodes = sum(chunk.is_decode for chunk in chunks)
        if not all(chunk.num_sampled for chunk in chunks[:decodes]):
            return None
        if decodes == len(chunks):
            return self._sizes.key(decodes, longest(chunks))
        # Log-probabilities of prompts and vectors need the hidden states of all rows, without the padding rows that a
        # graph has between them.
        prompts = chunks[decodes:]
        if any(c.sequence.params.prompt_logprobs is not None or c.sequence.kind != "generate" for c in chunks):
            return None
        tokens, saves = sum(c.end - c.start for c in prompts), max(len(c.saves) for c in prompts)
        key = self._sizes.mixed_key(decodes, longest(chunks), tokens, len(prompts))
        return key if saves <= SAVES_PER_PROMPT else None

    def is_ready(self, key: GraphKey) -> bool:
        """Returns whether a step of this size is to run as a graph: the graph exists, or can be captured now.

        The first step with prompts of a size runs without a graph, because many sizes come only once. If the memory
        is short, the size stays without a graph, and the first such size is named in a warning.
        """
        if key in self._graphs:
            return True
        if key in self._without:
            return False
        if key.prompts:
            if key not in self._seen:
                if len(self._seen) == MOST_SEEN:
                    self._seen.clear()
                self._seen.add(key)
                return False
            if sum(bool(k.prompts) for k in self._graphs) >= self._sizes.most_mixed:
                if not self._sizes.on_cpu:
                    return False
                self._drop_oldest()
        # The graphs share the memory of their activations, so only a graph with more rows than all others needs more.
        largest = max((k.rows + k.tokens for k in self._graphs), default=0)
        needed = BYTES_PER_GRAPH + max(0, key.rows + key.tokens - largest) * self._bytes_per_row
        if self._free_bytes is None or (free := self._free_bytes()) >= needed:
            return True
        if not self._without:
            logger.warning(
                "a graph of %d rows is not captured, because it needs about %d bytes and %d are free; such steps run "
                "without a graph, and a lower gpu_memory_utilization leaves more",
                key.rows + key.tokens, needed, free,
            )  # fmt: skip
        self._without.add(key)
        return False

    def _drop_oldest(self) -> None:
        """Drops the least recently used graph of a step with prompts."""
        del self._graphs[next(key for key in self._graphs if key.prompts)]

    def capture_ladder(self, reply: Chunk, sampled: SampledTokens | None) -> int:
        """Captures the graphs of decode steps of the shortest contexts, so that no request waits for them. `reply` is
        a chunk that decodes with page 0 and state slot 0. Returns the number of graphs."""
        context = self._sizes.contexts[0]
        for rows in reversed(self._sizes.rows):  # the largest first: the smaller ones share its memory
            key = GraphKey(rows, context)
            if self._sizes.key(rows, context) == key and key not in self._graphs and self.is_ready(key):
                self.forward(key, [reply] * rows, sampled)
        return len(self._graphs)

    def forward(self, key: GraphKey, chunks: Many[Chunk], sampled: SampledTokens | None) -> Tensor:
        """Runs one step with the graph of size `key`. If no graph of this size exists yet, the step is run and is
        captured as a new graph. Returns the hidden states [n, H] of the rows from which tokens are sampled, which are
        valid until the next step."""
        changes = [] if self._tables is None else [*self._tables.update(chunks)]
        arrays = self._arrays(key, chunks, sampled)
        rows = logit_rows(chunks, padding=key.rows - _num_decodes(key, chunks)) if key.prompts else None
        extra = [*changes, *([] if rows is None else [rows])] if any(map(len, changes)) or rows is not None else []
        more = self._send(arrays, extra)
        if self._tables is not None and more:
            self._tables.apply(more[0], more[1])
        if (graph := self._graphs.pop(key, None)) is not None:
            self._graphs[key] = graph  # moved to the end of the dict, which is sorted by last use
            hidden = graph.replay()
        else:
            graph = self._new_graph()
            batch = partial(self._batch, key, cut(self._inputs, arrays), sampled)
            hidden = graph.capture(lambda: self._model.forward(batch(), self._storage))
            self._graphs[key] = graph  # only after the capture: a failed capture leaves no incomplete graph
            self._seen.discard(key)
        return hidden[: len(chunks)] if rows is None else hidden.index_select(0, more[-1])

    def _arrays(self, key: GraphKey, chunks: Many[Chunk], sampled: SampledTokens | None) -> list[Array]:
        """Returns the inputs of a graph, in the order in which `_batch` reads them."""
        block_size, tables = self._storage.block_size, self._tables
        decodes = chunks[: _num_decodes(key, chunks)]
        rows = row_arrays(decodes, block_size, padding=key.rows - len(decodes))
        arrays: list[Array] = []
        if key.rows:
            arrays += table_arrays(decodes, block_size, key.rows, key.context, tables)
        if key.prompts:
            prompts = chunks[len(decodes) :]
            used = sum(chunk.end - chunk.start for chunk in prompts)
            more = row_arrays(prompts, block_size, padding=key.tokens - used)
            rows = type(rows)(*map(np.concatenate, zip(rows, more, strict=True)))
            arrays += _padded_tables(key, table_arrays(prompts, block_size, key.prompts, key.context, tables), prompts)
            arrays += _padded_segments(key, segment_arrays(prompts))
        sources = [] if sampled is None else [sampled.sources(decodes, key.rows + key.tokens)]
        return [*rows, *arrays, *sources]

    def _send(self, arrays: list[Array], extra: list[Array]) -> list[Tensor]:
        """Copies the inputs of a graph to the beginning of the input buffer, and the step's `extra` arrays behind them
        if they fit. Returns the extra arrays as tensors on the device."""
        fits = not extra or packed_bytes([*arrays, *extra]) <= len(self._inputs)
        sent = [*arrays, *extra] if fits else arrays
        if self._inputs.is_cuda:
            packed = pack(sent, torch.empty(packed_bytes(sent), dtype=torch.uint8, pin_memory=True))
            self._inputs[: len(packed)].copy_(packed, non_blocking=True)
        else:
            pack(sent, self._inputs)
        return cut(self._inputs, extra, packed_bytes(arrays)) if fits else upload(extra, self._inputs.device)

    def _batch(self, key: GraphKey, inputs: Many[Tensor], sampled: SampledTokens | None) -> ForwardBatch:
        """Returns the batch whose tensors a graph reads. The tensors of the batch are the argument `inputs`. These
        tensors are views of the input buffer that all graphs share."""
        token_ids, kv_slots, *others = inputs
        rest, gather = iter(others), TableGather(self._tables, self._storage.block_size)
        decodes = decodes_of(rest, key.context, gather) if key.rows else None
        prefills = prefills_of(rest, key.context, key.tokens, gather) if key.prompts else None
        return ForwardBatch(
            token_ids=token_ids if sampled is None else sampled.fill(token_ids, next(rest)),
            kv_slots=kv_slots,
            logit_rows=token_ids[:0],  # empty: `forward` selects the rows, because their number changes
            num_decodes=key.rows,
            decodes=decodes,
            prefills=prefills,
        )


def _num_decodes(key: GraphKey, chunks: Many[Chunk]) -> int:
    """Returns how many chunks a graph computes as replies. These are the first chunks of the step."""
    return min(sum(chunk.is_decode for chunk in chunks), key.rows)


def _padding_lengths(key: GraphKey, prompts: int, tokens: int) -> Array:
    """Returns the number of rows of each padding prompt: 1, except that the last one has all remaining rows."""
    lengths = np.ones(key.prompts - prompts, dtype=np.int32)
    if len(lengths):
        lengths[-1] = key.tokens - tokens - (len(lengths) - 1)
    return lengths


def _padded_tables(key: GraphKey, arrays: TableArrays, prompts: Many[Chunk]) -> TableArrays:
    """Sets the context length of each padding prompt to its number of rows, because it has no earlier tokens."""
    used = sum(chunk.end - chunk.start for chunk in prompts)
    lengths = _padding_lengths(key, len(prompts), used)
    return arrays._replace(context_lens=np.concatenate([arrays.context_lens[: len(prompts)], lengths]))


def _padded_segments(key: GraphKey, arrays: SegmentArrays) -> SegmentArrays:
    """Adds padding prompts, which have no state and save none. The lists of saved states are padded at their end with
    row 0 and slot 0."""
    prompts, used = len(arrays.has_state), int(arrays.query_start[-1])
    starts = used + np.cumsum(_padding_lengths(key, prompts, used), dtype=np.int32)
    more, saves = key.prompts - prompts, key.prompts * SAVES_PER_PROMPT - len(arrays.save_rows)
    return SegmentArrays(
        query_start=np.concatenate([arrays.query_start, starts]),
        save_start=np.concatenate([arrays.save_start, np.repeat(arrays.save_start[-1:], more)]),
        save_rows=np.concatenate([arrays.save_rows, np.zeros(saves, dtype=np.int32)]),
        save_slots=np.concatenate([arrays.save_slots, np.zeros(saves, dtype=np.int32)]),
        has_state=np.concatenate([arrays.has_state, np.zeros(more, dtype=np.bool_)]),
    )
