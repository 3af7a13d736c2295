"""These ops compute causal attention over paged keys and values. Prefill and decode call one compiled function."""

from __future__ import annotations

from torch import Tensor

from jamba_server.kernels.cpu.library import DTYPES, FLOAT, INT, POINTER, library
from jamba_server.kernels.ops import Pages


class _Attention:
    def __init__(self) -> None:
        arguments = (*[POINTER] * 4, *[INT] * 10, *[POINTER] * 3, INT, INT, FLOAT)
        self._run = library().function("attention", *arguments)

    def _call(self, q: Tensor, pages: Pages, query_start: Tensor | None, scale: float) -> Tensor:
        rows, heads, size = q.shape
        _, block_size, kv_heads, _ = pages.k.shape
        strides = pages.k.stride()
        assert q.stride()[1:] == (size, 1) and strides[3] == 1 and strides == pages.v.stride(), "layout of heads, pages"
        out = q.new_empty(rows, heads, size)
        self._run(
            q.data_ptr(),
            pages.k.data_ptr(),
            pages.v.data_ptr(),
            out.data_ptr(),
            heads,
            kv_heads,
            size,
            block_size,
            q.stride(0),
            *strides[:3],
            pages.context_lens.shape[0],
            pages.block_tables.stride(0),
            pages.block_tables.data_ptr(),
            pages.context_lens.data_ptr(),
            None if query_start is None else query_start.data_ptr(),
            pages.max_context_len,
            DTYPES[q.dtype],
            scale,
        )
        return out


class AttentionPrefill(_Attention):
    """See `kernels.ops.AttentionPrefill`."""

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See `kernels.ops.AttentionPrefill`."""
        return self._call(q, pages, query_start, scale)


class AttentionDecode(_Attention):
    """See `kernels.ops.AttentionDecode`."""

    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """See `kernels.ops.AttentionDecode`."""
        return self._call(q, pages, None, scale)
