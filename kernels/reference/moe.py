"""This module computes Jamba's mixture of experts (Lieber et al. 2024, section 2).

Experts have no capacity limit, there is no shared expert, and no token is dropped. There is one difference from
transformers: the outputs of a token's experts are added in float32 and in the order of the token's top-k list, not in
the order of the experts' ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.kernels.reference.exact import ordered_sum, silu
from jamba_server.kernels.reference.linear import contiguous, float_product, product


def route_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See the protocol `kernels.ops.RouteExperts` for the arguments and the result."""
    wide = logits.float()
    weights = torch.exp(wide - wide.amax(-1, keepdim=True))
    probabilities = weights / ordered_sum(weights, -1)
    # Of equal probabilities, the lower expert id must come first. A stable sort does this; torch.topk does not always.
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    return best.values[:, :top_k], best.indices[:, :top_k].int()


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See the protocol `kernels.ops.SiluAndMul` for the arguments and the result."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate.float()).to(up.dtype) * up


class Experts(NamedTuple):
    """Contains two weights for each expert: gate_up [2F, H] and down [H, F].

    In gate_up, the F rows of the gate come before the F rows of the up projection.
    """

    gate_up: tuple[Tensor | QuantizedWeight, ...]
    down: tuple[Tensor | QuantizedWeight, ...]


def _each(weight: Tensor | QuantizedWeight) -> tuple[Tensor | QuantizedWeight, ...]:
    """Splits a weight [E, N, K] into E matrices [N, K]."""
    whole = contiguous(weight)
    if isinstance(whole, Tensor):
        return whole.unbind()
    return tuple(whole.each(lambda tensor, e=e: tensor[e]) for e in range(len(whole.values)))


class RunExperts:
    """Implements the protocol `kernels.ops.RunExperts`.

    The results are not batch-invariant, because torch's matrix products are not batch-invariant.
    """

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Experts:
        """Returns the weights as one contiguous matrix for each expert."""
        return Experts(_each(gate_up), _each(down))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        return run_each(x, experts.gate_up, experts.down, weights, ids, product)

    def sums(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        tokens, top_k = ids.shape
        outputs = x.new_empty(tokens * top_k, out.shape[1], dtype=torch.float32)
        for expert, entries in _entries(ids, len(experts.down)):
            hidden = silu_and_mul(product(x[entries // top_k], experts.gate_up[expert]))
            outputs[entries] = float_product(hidden, experts.down[expert])
        weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype).float()[:, :, None]
        out.copy_(_in_order(weighted))


def run_each(
    x: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    weights: Tensor,
    ids: Tensor,
    multiply: Callable[[Tensor, Any], Tensor],
) -> Tensor:
    """Runs each expert once, on all tokens that chose this expert. `multiply(x, weight)` computes x times the transpose
    of the weight of one expert."""
    tokens, top_k = ids.shape
    outputs = x.new_empty(tokens * top_k, x.shape[1])
    for expert, entries in _entries(ids, len(down)):
        hidden = silu_and_mul(multiply(x[entries // top_k], gate_up[expert]))
        outputs[entries] = multiply(hidden, down[expert])
    # As in transformers, the routing weights are rounded to x's dtype, and so is each expert's weighted output.
    weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype)[:, :, None]
    return _in_order(weighted).to(x.dtype)


def _entries(ids: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each expert that a token chose, with its entries: the numbers t * K + i of entry i of token t's list."""
    chosen = ids.flatten()
    by_expert = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=num_experts).tolist()
    for expert, entries in enumerate(by_expert.split(counts)):
        if len(entries):
            yield expert, entries


def _in_order(weighted: Tensor) -> Tensor:
    """Returns the sum of [T, K, H] over K in float32, added one after the other."""
    total = weighted[:, 0].float()
    for rank in range(1, weighted.shape[1]):
        total = total + weighted[:, rank].float()
    return total
