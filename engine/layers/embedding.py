"""Embedding: the rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Unit


class Embedding:
    """Token ids int64 [T] -> dtype [T, H]. `weight` [V, H] stays as it is on disk, until a tied head has taken it."""

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        self._linear = backend.kernels.linear
        self.weight: Tensor | None = backend.empty(vocab_size, hidden_size)
        self._packed: Any = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self._linear.rows(self._packed if self.weight is None else self.weight, token_ids)

    def unit(self, name: str, pack: Callable[[], None]) -> Unit:
        """`pack` is a tied head's."""
        assert self.weight is not None
        return Unit({f"{name}.weight": Destination(self.weight, "unit")}, pack)

    def tie(self, head: Linear) -> None:
        """Reads the rows of a head of the same weight from now on, which is packed: it is in memory once."""
        self.weight, self._packed = None, head.weight
