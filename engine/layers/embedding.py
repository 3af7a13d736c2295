"""Embedding: looks up the vectors of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Unit


class Embedding:
    """Maps token ids, int64 [T], to vectors [T, H] in the model's dtype. `weight`, [V, H], keeps its layout on disk. If
    the head shares the matrix, `weight` is None once the head has packed it, and rows are read from the packed form."""

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        self._linear = backend.kernels.linear
        self.weight: Tensor | None = backend.empty(vocab_size, hidden_size)
        self._packed: Any = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self._linear.rows(self._packed if self.weight is None else self.weight, token_ids)

    def unit(self, name: str, pack: Callable[[], None]) -> Unit:
        """Returns the unit to load. `pack` is called when the weight is filled: it packs a head that shares it."""
        assert self.weight is not None
        return Unit({f"{name}.weight": Destination(self.weight, "unit")}, pack)

    def tie(self, head: Linear) -> None:
        """From now on reads the vectors from the packed weight of `head`, so that the shared matrix is in memory only
        once."""
        self.weight, self._packed = None, head.weight
