"""Embedding: the rows of a table."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.layers.parameter import Backend, Destination, Destinations


class Embedding:
    """Token ids int64 [T] -> dtype [T, H]. `weight` [V, H] stays as it is on disk, for a tied head to share."""

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        self.weight = backend.empty(vocab_size, hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def destinations(self, name: str) -> Destinations:
        yield f"{name}.weight", Destination(self.weight, "unit")
