"""This op is the router of a mixture of experts: it chooses the experts of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.arguments import units
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library


class RouteExperts:
    """Implements the protocol `kernels.ops.RouteExperts` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("route_experts", *[POINTER] * 3, *[INT] * 5)

    def __call__(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See the protocol `kernels.ops.RouteExperts` for the arguments and the result."""
        rows, experts = shape = logits.shape[0], logits.shape[-1]
        units("logits", logits, logits.dtype, shape)
        require(0 < top_k <= experts, "logits", logits, "have at least top_k experts, and top_k be above 0")
        weights = logits.new_empty(rows, top_k, dtype=torch.float32)
        ids = logits.new_empty(rows, top_k, dtype=torch.int32)
        self._run(
            logits.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            rows,
            experts,
            top_k,
            logits.stride(0),
            DTYPES[logits.dtype],
        )
        return weights, ids
