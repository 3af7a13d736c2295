"""Graphs of steps in which every sequence decodes: hundreds of kernels in one launch, on a GPU as on a CPU.

A graph repeats its kernels with the same addresses and the same numbers. So its inputs lie in one buffer that every
step fills anew; its batch is, on a GPU, the next larger one of a ladder, where padding rows read and write page 0 and
state 0, which no sequence owns; and its page tables have room for the next longer of a few contexts. A graph is
captured when a step first needs it, so that nobody waits for graphs that are never used: on a CPU while that step runs,
on a GPU after it, for then all that the capture meets is compiled.
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

# Their reference asks the device for sizes, which a capture cannot.
UNCAPTURED_OPS = (  # of no graph
    *("sample", "copy_slots", "compress_states", "restore_states"),
    *("causal_conv1d", "selective_scan", "attention_prefill"),
)
WAITING_OPS = ("attention_decode", "run_experts", "causal_conv1d_update", "selective_state_update")


class Graph(Protocol):
    """Work that is recorded once and then repeated as a whole."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Runs `run`, with effect once, and records what it launches. Returns what it returned. Called once."""
        ...

    def replay(self) -> Tensor:
        """Repeats it; what `run` returned, which the next replay of any graph may overwrite."""
        ...


class CudaGraph:
    """A `Graph` on the current device. Graphs with one `pool` share their memory."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._graph = pool, torch.cuda.CUDAGraph()
        self._output: Tensor | None = None

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        output = run()  # a capture computes nothing, and must not meet what is not compiled yet
        started = time.monotonic()
        # only what this thread does counts: others may compile or allocate meanwhile
        try:
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output = run()
        except RuntimeError as error:  # which leaves torch's allocator as it was in the middle: the engine must end
            raise RuntimeError(
                f"no CUDA graph of {len(output)} sequences could be captured ({error}); --enforce-eager does without"
            ) from error
        rows, seconds = len(output), time.monotonic() - started
        logger.info("captured a CUDA graph of %d sequences in %.2f s", rows, seconds)
        return output

    def replay(self) -> Tensor:
        assert self._output is not None, "nothing was captured"
        self._graph.replay()
        return self._output


def why_no_graphs(names: Mapping[str, str], device: str) -> str | None:
    """Which of the kernels chosen (op -> implementation) keep a step from being captured; None: none of them. On a CPU
    only calls of the compiled library can be."""
    on_cpu = device == "cpu"
    candidates = (op for op in names if op not in UNCAPTURED_OPS) if on_cpu else WAITING_OPS
    ops = [f"{op}={names[op]}" for op in candidates if (names[op] != "cpu" if on_cpu else names[op] == "reference")]
    return f"{', '.join(ops)} cannot be captured" if ops else None


class DecodeGraphs:
    """The graphs of one model upon one storage, by number of rows and longest context."""

    def __init__(
        self, model: Model, storage: CacheStorage, *, sizes: GraphSizes, new_graph: Callable[[], Graph]
    ) -> None:
        self._model, self._storage, self._sizes, self._new_graph = model, storage, sizes, new_graph
        self._graphs: dict[GraphKey, Graph] = {}
        most = sizes.input_bytes(storage.block_size)
        self._inputs = torch.empty(most, dtype=torch.uint8, device=storage.kv.device)

    @property
    def captured(self) -> frozenset[GraphKey]:
        """Of which graphs there are by now."""
        return frozenset(self._graphs)

    def key(self, chunks: Many[Chunk]) -> GraphKey | None:
        """Of the graph that runs these chunks; None if there is none."""
        if not all(chunk.is_decode and chunk.num_sampled for chunk in chunks):
            return None
        return self._sizes.key(len(chunks), longest(chunks))

    def forward(self, key: GraphKey, chunks: Many[Chunk], sampled: SampledTokens | None) -> Tensor:
        """Hidden states [len(chunks), H], valid until the next step."""
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
        self._graphs[key] = graph  # now that it is whole
        return hidden[: len(chunks)]

    def _batch(self, key: GraphKey, inputs: Many[Tensor], sampled: SampledTokens | None) -> ForwardBatch:
        """Of the arrays of `forward`."""
        token_ids, kv_slots, state_ids, block_tables, context_lens, *sources = inputs
        return ForwardBatch(
            token_ids=token_ids if sampled is None else sampled.fill(token_ids, *sources),
            kv_slots=kv_slots,
            logit_rows=token_ids[:0],  # all rows are wanted
            num_decodes=key.rows,
            decodes=Decodes(state_ids, PageTables(block_tables, context_lens, key.context)),
            prefills=None,
        )
