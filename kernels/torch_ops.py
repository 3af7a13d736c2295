"""The classes of this module implement ops with PyTorch's own kernels for GPUs, for steps with many tokens.

They are the implementations named "torch" in `table.py`. PyTorch chooses the order of sums by the shape of the batch,
so these implementations are not batch-invariant. Each class calls a Triton kernel for inputs that PyTorch's kernel does
not support. The code of this module never makes the host wait for the GPU. The constants below, which decide between
PyTorch and Triton, are estimates that have not been measured on a GPU yet.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels import ops
from jamba_server.kernels.gated_linear import GatedLinear
from jamba_server.kernels.ops import KernelUnavailable, Pages, QuantizedWeight, Weight

# Flash attention is used only if some sequence of the batch has at least this number of new tokens. With fewer new
# tokens, copying the cached keys and values takes more time than flash attention saves.
MIN_QUERY_LEN = 64
MAX_GATHERED_BYTES = 1 << 29  # the largest total size, in bytes, of the copied keys and values
# torch's grouped matrix product is used only if an expert has at least this number of tokens on average. With fewer
# tokens, the products are memory-bound.
MIN_ROWS_PER_EXPERT = 32
# torch's matrix product x @ weight.T is used only if x has at least this number of rows. With fewer rows, the product
# is memory-bound.
MIN_ROWS = 65
# The compute capabilities of GPUs for which torch has a grouped product. On other GPUs, torch loops over the experts
# and the host waits for the GPU.
GROUPED_CAPABILITIES = ((9, 0), (10, 0))


class AttentionPrefill:
    """Implements the protocol `kernels.ops.AttentionPrefill` with torch's flash attention.

    The function is `varlen_attn` of torch.nn.attention.varlen, which accepts concatenated sequences.

    Flash attention reads contiguous keys and values. The keys and values of all contexts are therefore gathered from
    their pages first, one sequence after the other. The implementation `other` is used for inputs that flash attention
    does not support, for sequences with few new tokens, and where the gathered copies would be too large.
    """

    def __init__(self, other: ops.AttentionPrefill) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if not torch.backends.cuda.is_flash_attention_available():
            raise KernelUnavailable("this build of torch has no flash attention")
        self._attend: Any = varlen_attn
        self._other = other
        # If there are fewer KV heads than query heads, versions of torch after 2.11 need the option `enable_gqa`. torch
        # 2.11 does not have this option.
        self._options = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See the protocol `kernels.ops.AttentionPrefill` for the arguments and the result."""
        # `tokens` is an upper bound of the total number of cached tokens. The host knows this bound without waiting
        # for the GPU.
        tokens = len(pages.context_lens) * pages.max_context_len
        if not _fits(q, pages, tokens) or max_query_len < MIN_QUERY_LEN:
            return self._other(q, pages, query_start, max_query_len, scale)
        key_start = F.pad(pages.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        k, v = _gather(pages, key_start, tokens)
        window = (-1, 0)  # A row sees all earlier keys (-1) and no later keys (0).
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
    """Returns (keys, values). Each is the concatenation over all sequences: [tokens, G, Z].

    `key_start` [N+1] has the number of each sequence's first row in the results, then the total number of cached
    tokens. `tokens` may be larger than that total; the rows after the last sequence are undefined.
    """
    token = torch.arange(tokens, dtype=torch.int32, device=key_start.device)
    sequence = (torch.searchsorted(key_start, token, right=True) - 1).clamp_(max=len(key_start) - 2)
    position = token - key_start[sequence]
    block_size = pages.k.shape[1]
    page = pages.block_tables[sequence, (position // block_size).clamp_(max=pages.block_tables.shape[1] - 1)]
    offset = position % block_size
    return pages.k[page, offset], pages.v[page, offset]


class Linear:
    """Implements the protocol `kernels.ops.Linear` with torch's matrix product (cuBLAS), for many rows of x.

    The implementation `other` computes products of few rows and products with quantised weights. The method
    `other.pack` must not change the layout of weights that are not quantised.
    """

    def __init__(self, other: ops.Linear) -> None:
        self._other, self._gated = other, other.gated if isinstance(other, GatedLinear) else None

    def pack(self, weight: Weight) -> Any:
        """Returns the weight as `other.pack` returns it. Only a quantised weight gets another layout."""
        return self._other.pack(weight)

    def rows(self, weight: Any, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        return self._other.rows(weight, ids, dtype)

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, Tensor) or len(x) < MIN_ROWS:
            return self._other(x, weight, bias)
        return F.linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Any, activation: ops.SiluAndMul) -> Tensor:
        """See the protocol `kernels.gated_linear.GatedLinear` for the arguments and the result."""
        if self._gated is None or (isinstance(weight, Tensor) and len(x) >= MIN_ROWS):
            return activation(self(x, weight))
        return self._gated(x, weight, activation)

    def sums(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """See the protocol `kernels.ops.Linear`. The weight is one that `other.pack` has packed."""
        self._other.sums(x, weight, out)


class Experts(NamedTuple):
    """Contains the weights of a layer's experts, for torch's grouped matrix product and for the Triton kernel.

    `matrices` is (gate_up [E, 2F, H], down [E, H, F]), or None if torch's grouped product does not support the weights.
    `packed` has the same weights in the layout of the Triton kernel. `packed` and `matrices` share their memory.
    """

    matrices: tuple[Tensor, Tensor] | None
    packed: Any


class RunExperts:
    """Implements the protocol `kernels.ops.RunExperts` with torch's grouped product, for many tokens in bfloat16.

    The implementation `other` is used for few tokens, for quantised weights and for other dtypes. Both implementations
    use one copy of the weights.
    """

    def __init__(self, silu_and_mul: ops.SiluAndMul, other: ops.RunExperts) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() not in GROUPED_CAPABILITIES:
            need = " or ".join(f"{major}.{minor}" for major, minor in GROUPED_CAPABILITIES)
            raise KernelUnavailable(f"torch's grouped product needs a GPU of compute capability {need}")
        self._silu_and_mul, self._other = silu_and_mul, other

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Experts:
        """Returns the weights for torch's grouped product and for the Triton kernel.

        Only quantised weights get another layout.
        """
        if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.dtype != torch.bfloat16:
            return Experts(None, self._other.pack(gate_up, down))
        gate_up, down = gate_up.contiguous(), down.contiguous()
        # torch's grouped product needs weights whose rows have a multiple of 16 bytes, which is 8 bfloat16 elements.
        aligned = gate_up.shape[2] % 8 == down.shape[2] % 8 == 0
        return Experts((gate_up, down) if aligned else None, self._other.pack(gate_up, down))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        if experts.matrices is None or ids.numel() < MIN_ROWS_PER_EXPERT * len(experts.matrices[0]):
            return self._other(x, experts.packed, weights, ids)
        gate_up, down = experts.matrices
        tokens, top_k = ids.shape
        chosen = ids.flatten().sort(stable=True)  # chosen.indices: t * K + i is entry i of token t's list
        numbers = torch.arange(len(down), dtype=torch.int32, device=x.device)
        ends = torch.searchsorted(chosen.values, numbers, right=True, out_int32=True)
        hidden = self._silu_and_mul(F.grouped_mm(x[chosen.indices // top_k], gate_up.transpose(1, 2), offs=ends))
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        outputs[chosen.indices] = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype)[:, :, None]
        return weighted.sum(1, dtype=torch.float32).to(x.dtype)

    def sums(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """See the protocol `kernels.ops.RunExperts`. The implementation `other` runs the experts."""
        self._other.sums(x, experts.packed, weights, ids, out)
