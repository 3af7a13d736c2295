"""PyTorch's own fast kernels for many tokens: entries named "torch" of the table.

They choose tiles and splits by the shape of the batch, so a row's last bits depend on it. Where they do not apply, the
Triton kernels that they are loaded with take over. Nobody waits for the device. The limits are estimates: none has
been measured on a GPU yet.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels import ops
from jamba_server.kernels.ops import KernelUnavailable, Pages, Weight

MIN_QUERY_LEN = 64  # below, gathering the keys costs more than the faster product gains
MAX_GATHERED_BYTES = 1 << 29  # of contiguous keys and values, while an op runs
MIN_ROWS_PER_EXPERT = 32  # below, experts are read rather than computed with
MIN_ROWS = 65  # of a product; below, the weight is read rather than computed with
GROUPED_CAPABILITIES = ((9, 0), (10, 0))  # elsewhere torch runs a loop over the experts, and waits for the device


class AttentionPrefill:
    """See `kernels.ops.AttentionPrefill`; by flash attention over packed sequences (torch.nn.attention.varlen).

    It reads contiguous keys and values, so those of all contexts are gathered from their pages first, packed as the
    rows are. `other` is for what flash attention does not take (float32, odd head sizes), for short runs, and where the
    gathered keys and values would be too large.
    """

    def __init__(self, other: ops.AttentionPrefill) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if not torch.backends.cuda.is_flash_attention_available():
            raise KernelUnavailable("this build of torch has no flash attention")
        self._attend: Any = varlen_attn
        self._other = other
        # torch 2.11 takes fewer KV heads than query heads as they are; later ones want to be told
        self._options = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See `kernels.ops.AttentionPrefill`."""
        # known without waiting for the device: at least the tokens of all contexts
        tokens = len(pages.context_lens) * pages.max_context_len
        if not _fits(q, pages, tokens) or max_query_len < MIN_QUERY_LEN:
            return self._other(q, pages, query_start, max_query_len, scale)
        key_start = F.pad(pages.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        k, v = _gather(pages, key_start, tokens)
        window = (-1, 0)  # causal: the last row of a sequence sees its last key
        lengths = max_query_len, pages.max_context_len
        return self._attend(q, k, v, query_start, key_start, *lengths, scale=scale, window_size=window, **self._options)


def _fits(q: Tensor, pages: Pages, tokens: int) -> bool:
    size = q.shape[2]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and pages.k.dtype == q.dtype
        and size % 8 == 0
        and size <= 256
        and 2 * tokens * pages.k[0, 0].nbytes <= MAX_GATHERED_BYTES
    )


def _gather(pages: Pages, key_start: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V [tokens, G, Z] of all contexts, one after the other; behind the last of them anything."""
    token = torch.arange(tokens, dtype=torch.int32, device=key_start.device)
    sequence = (torch.searchsorted(key_start, token, right=True) - 1).clamp_(max=len(key_start) - 2)
    position = token - key_start[sequence]
    block_size = pages.k.shape[1]
    page = pages.block_tables[sequence, (position // block_size).clamp_(max=pages.block_tables.shape[1] - 1)]
    offset = position % block_size
    return pages.k[page, offset], pages.v[page, offset]


class Linear:
    """See `kernels.ops.Linear`; of many rows by torch's product (cuBLAS), of few rows and with quantised weights by
    `other`, which must keep the layout of floats."""

    def __init__(self, other: ops.Linear) -> None:
        self._other = other

    def pack(self, weight: Weight) -> Any:
        """Keeps the layout of floats; the others are packed for `other`."""
        return self._other.pack(weight)

    def rows(self, weight: Any, ids: Tensor) -> Tensor:
        """See `kernels.ops.Linear`."""
        return self._other.rows(weight, ids)

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """See `kernels.ops.Linear`."""
        if not isinstance(weight, Tensor) or len(x) < MIN_ROWS:
            return self._other(x, weight, bias)
        return F.linear(x, weight, bias)


class Experts(NamedTuple):
    """gate_up [E, 2F, H] and down [E, H, F], None where torch's kernel does not take them; `packed` for the other."""

    matrices: tuple[Tensor, Tensor] | None
    packed: Any


class RunExperts:
    """See `kernels.ops.RunExperts`; of many rows by torch's grouped product, of few by `other`, which shares its
    weights and takes those alone that are quantised or no bfloat16."""

    def __init__(self, silu_and_mul: ops.SiluAndMul, other: ops.RunExperts) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() not in GROUPED_CAPABILITIES:
            need = " or ".join(f"{major}.{minor}" for major, minor in GROUPED_CAPABILITIES)
            raise KernelUnavailable(f"torch's grouped product needs a GPU of compute capability {need}")
        self._silu_and_mul, self._other = silu_and_mul, other

    def pack(self, gate_up: Weight, down: Weight) -> Experts:
        """Keeps the layout."""
        if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.dtype != torch.bfloat16:
            return Experts(None, self._other.pack(gate_up, down))
        gate_up, down = gate_up.contiguous(), down.contiguous()
        # rows of whole 16 bytes, which the grouped product wants
        aligned = gate_up.shape[2] % 8 == down.shape[2] % 8 == 0
        return Experts((gate_up, down) if aligned else None, self._other.pack(gate_up, down))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """See `kernels.ops.RunExperts`."""
        if experts.matrices is None or ids.numel() < MIN_ROWS_PER_EXPERT * len(experts.matrices[0]):
            return self._other(x, experts.packed, weights, ids)
        gate_up, down = experts.matrices
        tokens, top_k = ids.shape
        chosen = ids.flatten().sort(stable=True)  # entry t * K + rank is token t's choice of that rank
        numbers = torch.arange(len(down), dtype=torch.int32, device=x.device)
        ends = torch.searchsorted(chosen.values, numbers, right=True, out_int32=True)
        hidden = self._silu_and_mul(F.grouped_mm(x[chosen.indices // top_k], gate_up.transpose(1, 2), offs=ends))
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        outputs[chosen.indices] = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype)[:, :, None]
        return weighted.sum(1, dtype=torch.float32).to(x.dtype)
