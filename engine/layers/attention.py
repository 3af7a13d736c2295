"""The class `Attention`: grouped-query attention over keys and values that are stored in pages. Jamba has no positional
encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Units
from jamba_server.engine.layers.row_linear import row_linear
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.pieces import Piece


class Attention:
    """Maps hidden states [T, hidden_size] to outputs of the same shape. `k_pages` and `v_pages` are the K and V pages
    of this layer, each [pages, block_size, KV heads, head_dim]. Each rank has some of the query heads, and the KV heads
    that they read."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        self._kernels = backend.kernels
        self._head_dim = config.head_dim
        heads, kv = (own.times(config.head_dim) for own in (backend.parts.heads, backend.parts.kv_heads))
        owned = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
        self._qkv = Linear(
            backend,
            config.hidden_size,
            {name: len(own) for name, own in owned.items()},
            role="attention",
            pieces={name: Piece.of(own, 0) for name, own in owned.items()},
        )
        self._out = row_linear(backend, heads, "o_proj", config.hidden_size, role="attention")

    def __call__(self, x: Tensor, batch: ForwardBatch, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self._head_dim)) for y in self._qkv.split(self._qkv(x)))
        # The keys and values of this step's tokens are written to the pages before attention reads them from the pages.
        # Attention then uses keys and values that are rounded to the dtype of the KV cache. Later steps will use the
        # same rounded keys and values. Results therefore do not depend on how a prompt is split into chunks.
        self._kernels.write_kv(k, v, k_pages, v_pages, batch.kv_slots)
        return self._out(self._attend(q, batch, k_pages, v_pages).flatten(1))

    def _attend(self, q: Tensor, batch: ForwardBatch, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        scale = self._head_dim**-0.5
        decode_q, prefill_q = q[: batch.num_decodes], q[batch.num_decodes :]
        parts: list[Tensor] = []
        if batch.decodes is not None:
            pages = batch.decodes.tables.pages(k_pages, v_pages)
            parts.append(self._kernels.attention_decode(decode_q, pages, scale))
        if batch.prefills is not None:
            pages, segments = batch.prefills.tables.pages(k_pages, v_pages), batch.prefills.segments
            starts, longest = segments.query_start, segments.max_query_len
            parts.append(self._kernels.attention_prefill(prefill_q, pages, starts, longest, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def units(self, prefix: str) -> Units:
        yield self._qkv.unit(prefix)
        yield self._out.unit(prefix)
