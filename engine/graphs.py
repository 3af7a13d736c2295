"""Graphs of decode steps. A step launches hundreds of kernels, and a graph launches all of these kernels with one call.
Graphs can be used on a GPU and on a CPU.

A graph repeats its kernels with the same addresses and sizes. Three things follow. The inputs of all graphs are in one
buffer, which every step fills anew. On a GPU a batch is padded to the next larger number of rows in a fixed list;
padding rows read and write page 0 and state slot 0, which no sequence owns. The page tables are as wide as the next
longer of a few context lengths needs.

A graph is captured when a step first needs it, so that nobody waits for graphs that are never used. On a CPU it is
recorded while that step runs. On a GPU it is captured after that step has run, because by then all kernels are
compiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from jamba_server.engine.batch import (
    Decodes,
    ForwardBatch,
    PageTables,
    SampledTokens,
    longest,
    row_arrays,
    table_arrays,
)
from jamba_server.engine.cache.graph_sizes import GraphKey, GraphSizes
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.models import Model
from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.staging import cut, pack, packed_bytes

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
                f"the CUDA graph of {len(output)} sequences could not be captured ({error}); --enforce-eager runs "
                "steps without graphs"
            ) from error
        rows, seconds = len(output), time.monotonic() - started
        logger.info("captured a CUDA graph of %d sequences in %.2f s", rows, seconds)
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


class DecodeGraphs:
    """The graphs of one model with one cache storage. There is one graph for each size, which is a number of rows and a
    context length (`GraphKey`)."""

    def __init__(
        self, model: Model, storage: CacheStorage, *, sizes: GraphSizes, new_graph: Callable[[], Graph]
    ) -> None:
        self._model, self._storage, self._sizes, self._new_graph = model, storage, sizes, new_graph
        self._graphs: dict[GraphKey, Graph] = {}
        most = sizes.input_bytes(storage.block_size)
        self._inputs = torch.empty(most, dtype=torch.uint8, device=storage.kv.device)

    @property
    def captured(self) -> frozenset[GraphKey]:
        """Returns the sizes of all captured graphs."""
        return frozenset(self._graphs)

    def key(self, chunks: Many[Chunk]) -> GraphKey | None:
        """Returns the size of the graph that can run these chunks, or None if no graph can run these chunks."""
        if not all(chunk.is_decode and chunk.num_sampled for chunk in chunks):
            return None
        return self._sizes.key(len(chunks), longest(chunks))

    def forward(self, key: GraphKey, chunks: Many[Chunk], sampled: SampledTokens | None) -> Tensor:
        """Runs one step with the graph of size `key`. If no graph of this size exists yet, the step is run and is
        captured as a new graph. Returns the hidden states [len(chunks), H], which are valid until the next step."""
        padding, block_size = key.rows - len(chunks), self._storage.block_size
        tables = table_arrays(chunks, block_size, key.rows, key.context)
        arrays = [*row_arrays(chunks, block_size, padding=padding), *tables]
        if sampled is not None:
            arrays.append(sampled.sources(chunks, key.rows))
        if self._inputs.is_cuda:
            packed = pack(arrays, torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True))
            self._inputs[: len(packed)].copy_(packed, non_blocking=True)
        else:
            pack(arrays, self._inputs)
        if (graph := self._graphs.get(key)) is not None:
            return graph.replay()[: len(chunks)]
        batch = partial(self._batch, key, cut(self._inputs, arrays), sampled)
        graph = self._new_graph()
        hidden = graph.capture(lambda: self._model.forward(batch(), self._storage))
        self._graphs[key] = graph  # stored only after the capture, so that a failed capture leaves no incomplete graph
        return hidden[: len(chunks)]

    def _batch(self, key: GraphKey, inputs: Many[Tensor], sampled: SampledTokens | None) -> ForwardBatch:
        """Returns the batch whose tensors a graph reads. The tensors of the batch are the argument `inputs`. These
        tensors are views of the input buffer that all graphs share."""
        token_ids, kv_slots, state_ids, block_tables, context_lens, *sources = inputs
        return ForwardBatch(
            token_ids=token_ids if sampled is None else sampled.fill(token_ids, *sources),
            kv_slots=kv_slots,
            logit_rows=token_ids[:0],  # empty: every row of a decode step needs logits, so a graph does not select rows
            num_decodes=key.rows,
            decodes=Decodes(state_ids, PageTables(block_tables, context_lens, key.context)),
            prefills=None,
        )
