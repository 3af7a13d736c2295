"""Moe: a router and its experts (Lieber et al. 2024, section 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.parameter import Backend, Destination, Destinations, Fused
from engine.model_config import JambaConfig


class Moe:
    """The sum of a token's top-k experts, weighted by their softmax over all experts; x: [T, H]."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, f, e = config.hidden_size, config.intermediate_size, config.num_experts
        self._route, self._run = backend.kernels.route_experts, backend.kernels.run_experts
        self._top_k, self._num_experts, self._rows = config.num_experts_per_tok, e, f
        self._router = Linear(backend, h, {"router": e})
        self._raw: tuple[Tensor, Tensor] | None = (backend.empty(e, 2 * f, h), backend.empty(e, h, f))
        self._experts: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        weights, ids = self._route(self._router(x), self._top_k)
        return self._run(x, self._experts, weights, ids)

    def destinations(self, prefix: str) -> Destinations:
        """One tensor an expert and projection, as on the disk of every published checkpoint."""
        assert self._raw is not None, "packed weights cannot be loaded again"
        yield from self._router.destinations(prefix)
        for e, (gate_up, down) in enumerate(zip(*self._raw, strict=True)):
            yield f"{prefix}experts.{e}.gate_proj.weight", Destination(gate_up[: self._rows], "normed")
            yield f"{prefix}experts.{e}.up_proj.weight", Destination(gate_up[self._rows :], "normed")
            yield f"{prefix}experts.{e}.down_proj.weight", Destination(down, "normed")

    def fused(self, prefix: str) -> dict[str, Fused]:
        """All experts in two tensors, as in transformers 5: [E, 2F, H], gate rows first, and [E, H, F]."""
        assert self._raw is not None, "packed weights cannot be loaded again"
        gate_up, down = self._raw

        def parts(*projections: str) -> tuple[str, ...]:
            return tuple(f"{prefix}experts.{e}.{p}.weight" for e in range(self._num_experts) for p in projections)

        return {
            f"{prefix}experts.gate_up_proj": Fused(gate_up, parts("gate_proj", "up_proj")),
            f"{prefix}experts.down_proj": Fused(down, parts("down_proj")),
        }

    def pack(self) -> None:
        assert self._raw is not None, "weights are packed once"
        self._router.pack()
        self._experts = self._run.pack(*self._raw)
        self._raw = None
