"""Mlp: the dense feed-forward layer, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Units
from jamba_server.engine.layers.row_linear import row_linear
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.pieces import Piece


class Mlp:
    """Computes down(silu(gate(x)) * up(x)) for x [T, H]. Ranks divide the inputs of `down` among each other."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, inner = config.hidden_size, backend.parts.inner
        names = ("gate_proj", "up_proj")
        pieces = dict.fromkeys(names, Piece.of(inner, 0))
        self._gate_up = Linear(backend, h, dict.fromkeys(names, len(inner)), role="mlp", pieces=pieces)
        self._down = row_linear(backend, inner, "down_proj", h, role="mlp")
        self._silu_and_mul = backend.kernels.silu_and_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gate_up.gated(x, self._silu_and_mul))

    def units(self, prefix: str) -> Units:
        yield self._gate_up.unit(prefix)
        yield self._down.unit(prefix)
