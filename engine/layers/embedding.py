"""Embedding: the rows of a table."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from engine.layers.parameter import Backend, Destination, Unit


class Embedding:
    """Token ids int64 [T] -> dtype [T, H]. `weight` [V, H] stays as it is on disk, for a tied head to share."""

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        self.weight = backend.empty(vocab_size, hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def unit(self, name: str, pack: Callable[[], None]) -> Unit:
        """`pack` is a tied head's."""
        return Unit({f"{name}.weight": Destination(self.weight, "unit")}, pack)
