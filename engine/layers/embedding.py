"""Embedding: looks up the vectors of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Unit


class Embedding:
    """Maps token ids, int64 [T], to vectors [T, H] in the model's dtype. The field `weight` is the matrix [V, H], one
    row for each of the V token ids, in the same layout as on disk. If the language model head shares the matrix and is
    not quantised, the head packs the matrix into the layout of the head's kernel. Then `weight` becomes None, and
    vectors are read from the packed matrix."""

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        self._linear = backend.kernels.linear
        self.weight: Tensor | None = backend.empty(vocab_size, hidden_size)
        self._packed: Any = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self._linear.rows(self._packed if self.weight is None else self.weight, token_ids)

    def unit(self, name: str, pack: Callable[[], None]) -> Unit:
        """Returns the embedding's weights as a unit for the weight loader. The loader calls the function `pack` when
        the weight is filled. If a language model head shares the weight, `pack` packs this head; otherwise `pack` does
        nothing."""
        assert self.weight is not None
        return Unit({f"{name}.weight": Destination(self.weight, "unit")}, pack)

    def tie(self, head: Linear) -> None:
        """Makes the embedding read its vectors from the packed weight of `head`. Drops the embedding's reference to the
        raw weight, so that the shared matrix is in memory only once."""
        self.weight, self._packed = None, head.weight
