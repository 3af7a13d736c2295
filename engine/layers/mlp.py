"""Mlp: the dense feed-forward layer, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.parameter import Backend, Destinations
from engine.model_config import JambaConfig


class Mlp:
    """down(silu(gate(x)) * up(x)); x: [T, H]."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, f = config.hidden_size, config.intermediate_size
        self._gate_up = Linear(backend, h, {"gate_proj": f, "up_proj": f})
        self._down = Linear(backend, f, {"down_proj": h})
        self._silu_and_mul = backend.kernels.silu_and_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._silu_and_mul(self._gate_up(x)))

    def destinations(self, prefix: str) -> Destinations:
        yield from self._gate_up.destinations(prefix)
        yield from self._down.destinations(prefix)

    def pack(self) -> None:
        self._gate_up.pack()
        self._down.pack()
