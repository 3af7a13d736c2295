"""What layers and the weight loader say to each other: where a tensor of the checkpoint goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.ops import Kernels

Fill = Literal["normed", "unit", "one", "a_log", "dt_bias"]
"""How random weights fill a tensor: variance 1 / (last dimension), variance 1, all ones, log(1..S) in every row, or
such that softplus gives time steps from 0.001 to 0.1 (Gu & Dao 2023, section 3.6)."""


class Destination(NamedTuple):
    """Memory that one tensor of the checkpoint fills: a view, shaped as the tensor is on disk, of any stride."""

    data: Tensor
    fill: Fill


Destinations = Iterator[tuple[str, Destination]]
"""Pairs of a tensor's name on disk and where it goes."""


class Fused(NamedTuple):
    """Another layout's tensor that fills several destinations (by name) at once."""

    data: Tensor
    parts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """All that a checkpoint may hold. Each of `destinations` must be filled, once, by its own tensor or as part of a
    `fused` one; tensors named in `ignored` are known to be of no use."""

    destinations: dict[str, Destination]
    fused: dict[str, Fused]
    ignored: frozenset[str]


@dataclass(frozen=True, slots=True)
class Backend:
    """Where a model lives and what computes it."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised weights; on a CPU their memory is not taken before they are written."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
