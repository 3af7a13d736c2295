"""Mlp: the dense feed-forward layer, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Units
from jamba_server.engine.model_config import JambaConfig


class Mlp:
    """Computes down(silu(gate(x)) * up(x)) for x [T, H]."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, f = config.hidden_size, config.intermediate_size
        self._gate_up = Linear(backend, h, {"gate_proj": f, "up_proj": f}, role="mlp")
        self._down = Linear(backend, f, {"down_proj": h}, role="mlp")
        self._silu_and_mul = backend.kernels.silu_and_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._silu_and_mul(self._gate_up(x)))

    def units(self, prefix: str) -> Units:
        yield self._gate_up.unit(prefix)
        yield self._down.unit(prefix)
