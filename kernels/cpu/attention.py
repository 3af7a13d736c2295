"""These ops compute causal attention over paged keys and values. Prefill and decode call the same compiled function."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, FLOAT, INT, POINTER, level_number, library
from jamba_server.kernels.ops import Pages


class _Attention:
    """Uses the instruction set `level`, or the library's if `level` is None. Raises KernelUnavailable if the CPU lacks
    `level`."""

    def __init__(self, level: str | None = None) -> None:
        self._level = level_number(level)
        arguments = (*[POINTER] * 4, *[INT] * 10, *[POINTER] * 3, INT, INT, INT, FLOAT)
        self._run = library().function("attention", *arguments)

    def _call(self, q: Tensor, pages: Pages, query_start: Tensor | None, scale: float) -> Tensor:
        require(q.dim() == 3, "q", q, "have three dimensions: rows, heads and a head's size")
        rows, heads, size = q.shape
        block_size, kv_heads, strides = _check(q, pages, query_start)
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
            self._level,
            scale,
        )
        return out


def _check(q: Tensor, pages: Pages, query_start: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """Returns (tokens per page, number of KV heads, strides in elements). The strides are those of k and equally of v.

    Raises ValueError unless the library can read all of the tensors.
    """
    k, v, tables, context_lens, _ = pages
    units("q", q, q.dtype, q.shape)
    require(
        k.dim() == 4 and k.shape[3] == q.shape[2], "pages.k", k, "have four dimensions, the last of q's size of a head"
    )
    strides = k.stride()
    readable = k.dtype is q.dtype and strides[3] == 1 and k.is_cpu
    require(readable, "pages.k", k, "have q's dtype and contiguous heads, in the CPU's memory")
    same = v.dtype is q.dtype and v.shape == k.shape and v.stride() == strides and v.is_cpu
    require(same, "pages.v", v, "have dtype, shape and strides of pages.k, in the CPU's memory")
    require(q.shape[1] % k.shape[2] == 0, "q", q, "have a multiple of the heads of the pages")
    sequences = context_lens.shape[0] if query_start is not None else q.shape[0]
    whole("pages.context_lens", context_lens, torch.int32, (sequences,))
    units("pages.block_tables", tables, torch.int32, (sequences, tables.shape[-1]))
    enough = pages.max_context_len <= tables.shape[1] * k.shape[1]
    require(enough, "pages.block_tables", tables, "have room for max_context_len tokens")
    if query_start is not None:
        whole("query_start", query_start, torch.int32, (sequences + 1,))
    return k.shape[1], k.shape[2], strides


class AttentionPrefill(_Attention):
    """Implements the protocol `kernels.ops.AttentionPrefill` with the compiled library."""

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See the protocol `kernels.ops.AttentionPrefill` for the arguments and the result."""
        return self._call(q, pages, query_start, scale)


class AttentionDecode(_Attention):
    """Implements the protocol `kernels.ops.AttentionDecode` with the compiled library."""

    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """See the protocol `kernels.ops.AttentionDecode` for the arguments and the result."""
        return self._call(q, pages, None, scale)
