"""The table entries named "torch" use PyTorch's own fast kernels for many tokens.

PyTorch chooses tiles and splits by the shape of the batch, so these entries are not batch-invariant. Each entry falls
back to a Triton kernel where PyTorch's kernel does not apply. The host never waits for the device here. The limits
below are estimates; none has been measured on a GPU yet.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels import ops
from jamba_server.kernels.ops import KernelUnavailable, Pages, Weight

# If no sequence has this number of new tokens, copying the cached keys takes more time than flash attention saves.
MIN_QUERY_LEN = 64
MAX_GATHERED_BYTES = 1 << 29  # The largest size in bytes of attention's contiguous copy of keys and values.
# With fewer tokens per expert on average, the experts' products are memory-bound and torch's product is not used.
MIN_ROWS_PER_EXPERT = 32
MIN_ROWS = 65  # With fewer rows of x, a matrix product is memory-bound and torch's product is not used.
# torch has a grouped product for these compute capabilities. On other GPUs, torch loops over experts and waits.
GROUPED_CAPABILITIES = ((9, 0), (10, 0))


class AttentionPrefill:
    """Implements `kernels.ops.AttentionPrefill` with flash attention over packed sequences (torch.nn.attention.varlen).

    Flash attention reads contiguous keys and values. The keys and values of all contexts are therefore gathered from
    their pages first, one sequence after the other. The implementation `other` is used for inputs that flash attention
    does not support (float32, odd head sizes), for short runs, and where the gathered copies would be too large.
    """

    def __init__(self, other: ops.AttentionPrefill) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if not torch.backends.cuda.is_flash_attention_available():
            raise KernelUnavailable("this build of torch has no flash attention")
        self._attend: Any = varlen_attn
        self._other = other
        # torch 2.11 accepts fewer KV heads than query heads without an option. Later versions need enable_gqa.
        self._options = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See `kernels.ops.AttentionPrefill`."""
        # `tokens` is an upper bound of the number of cached tokens. The host knows `tokens` without waiting.
        tokens = len(pages.context_lens) * pages.max_context_len
        if not _fits(q, pages, tokens) or max_query_len < MIN_QUERY_LEN:
            return self._other(q, pages, query_start, max_query_len, scale)
        key_start = F.pad(pages.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        k, v = _gather(pages, key_start, tokens)
        window = (-1, 0)  # Attention is causal: the last row of a sequence sees all keys of the sequence.
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
    """Returns K and V [tokens, G, Z] of all sequences, concatenated. Rows after the last sequence are undefined.

    `key_start` [N+1] has the first row of each sequence.
    """
    token = torch.arange(tokens, dtype=torch.int32, device=key_start.device)
    sequence = (torch.searchsorted(key_start, token, right=True) - 1).clamp_(max=len(key_start) - 2)
    position = token - key_start[sequence]
    block_size = pages.k.shape[1]
    page = pages.block_tables[sequence, (position // block_size).clamp_(max=pages.block_tables.shape[1] - 1)]
    offset = position % block_size
    return pages.k[page, offset], pages.v[page, offset]


class Linear:
    """Implements `kernels.ops.Linear` with torch's matrix product (cuBLAS), for many rows of x.

    `other` computes products of few rows and products with quantised weights. Its `pack` must not change the layout of
    weights that are not quantised.
    """

    def __init__(self, other: ops.Linear) -> None:
        self._other = other

    def pack(self, weight: Weight) -> Any:
        """Returns the weight packed for the Triton kernel. Only a quantised weight changes its layout."""
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
    """Holds the weights of a layer's experts for torch's grouped product and for the Triton kernel.

    `matrices` is (gate_up [E, 2F, H], down [E, H, F]), or None if torch's kernel does not support them. `packed` is the
    Triton kernel's form; it shares the memory of `matrices`.
    """

    matrices: tuple[Tensor, Tensor] | None
    packed: Any


class RunExperts:
    """Implements `kernels.ops.RunExperts` with torch's grouped product, for many tokens in bfloat16.

    `other` computes all other cases: few tokens, quantised weights and other dtypes. Torch's product and `other` share
    one copy of the weights.
    """

    def __init__(self, silu_and_mul: ops.SiluAndMul, other: ops.RunExperts) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() not in GROUPED_CAPABILITIES:
            need = " or ".join(f"{major}.{minor}" for major, minor in GROUPED_CAPABILITIES)
            raise KernelUnavailable(f"torch's grouped product needs a GPU of compute capability {need}")
        self._silu_and_mul, self._other = silu_and_mul, other

    def pack(self, gate_up: Weight, down: Weight) -> Experts:
        """Returns the weights for torch's product and the Triton kernel. Only quantised weights change their layout."""
        if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.dtype != torch.bfloat16:
            return Experts(None, self._other.pack(gate_up, down))
        gate_up, down = gate_up.contiguous(), down.contiguous()
        # The grouped product needs rows whose size is a multiple of 16 bytes.
        aligned = gate_up.shape[2] % 8 == down.shape[2] % 8 == 0
        return Experts((gate_up, down) if aligned else None, self._other.pack(gate_up, down))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """See `kernels.ops.RunExperts`."""
        if experts.matrices is None or ids.numel() < MIN_ROWS_PER_EXPERT * len(experts.matrices[0]):
            return self._other(x, experts.packed, weights, ids)
        gate_up, down = experts.matrices
        tokens, top_k = ids.shape
        chosen = ids.flatten().sort(stable=True)  # Index t * K + i is entry i of token t's top-k list.
        numbers = torch.arange(len(down), dtype=torch.int32, device=x.device)
        ends = torch.searchsorted(chosen.values, numbers, right=True, out_int32=True)
        hidden = self._silu_and_mul(F.grouped_mm(x[chosen.indices // top_k], gate_up.transpose(1, 2), offs=ends))
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        outputs[chosen.indices] = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype)[:, :, None]
        return weighted.sum(1, dtype=torch.float32).to(x.dtype)
