"""Mixture of experts as Jamba has it (Lieber et al. 2024, section 2): no capacity, no shared expert, no dropped token.

Deviation from transformers: a token's outputs are added in the order of its ranking rather than of the experts'
numbers, and in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import Weight
from jamba_server.kernels.reference.exact import ordered_sum, silu
from jamba_server.kernels.reference.linear import contiguous, product


def route_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.RouteExperts`."""
    wide = logits.float()
    weights = torch.exp(wide - wide.amax(-1, keepdim=True))
    probabilities = weights / ordered_sum(weights, -1)
    # torch.topk leaves the order of equals open; a stable sort keeps the lower index first.
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    return best.values[:, :top_k], best.indices[:, :top_k].int()


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops.SiluAndMul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate.float()).to(up.dtype) * up


class Experts(NamedTuple):
    """gate_up [2F, H], gate rows first, and down [H, F] of each expert."""

    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]


def _each(weight: Weight) -> tuple[Weight, ...]:
    """The matrices of a weight [E, N, K]."""
    whole = contiguous(weight)
    if isinstance(whole, Tensor):
        return whole.unbind()
    pairs = zip(whole.values.unbind(), whole.scales.unbind(), strict=True)
    return tuple(whole._replace(values=values, scales=scales) for values, scales in pairs)


class RunExperts:
    """See `kernels.ops.RunExperts`. Not exact across batches: see `kernels.reference`."""

    def pack(self, gate_up: Weight, down: Weight) -> Experts:
        """Keeps the layout."""
        return Experts(_each(gate_up), _each(down))

    def __call__(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor) -> Tensor:
        """Each expert that any token chose runs once, on all of its tokens."""
        tokens, top_k = ids.shape
        chosen = ids.flatten()  # entry t * K + rank is token t's choice of that rank
        by_expert = chosen.argsort(stable=True)
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        counts = chosen.bincount(minlength=len(experts.down)).tolist()
        for expert, entries in enumerate(by_expert.split(counts)):
            if len(entries):
                hidden = silu_and_mul(product(x[entries // top_k], experts.gate_up[expert]))
                outputs[entries] = product(hidden, experts.down[expert])
        # Rounded where transformers rounds: the weights, then each expert's weighted output.
        weighted = outputs.view(tokens, top_k, -1) * weights.to(x.dtype)[:, :, None]
        total = weighted[:, 0].float()
        for rank in range(1, top_k):
            total = total + weighted[:, rank].float()
        return total.to(x.dtype)
