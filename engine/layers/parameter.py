"""What layers and the weight loader say to each other: where a tensor of the checkpoint goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.quantization import QuantizationPolicy, Role
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.kernels.ops import Kernels, QuantizedWeight, Weight

Fill = Literal["normed", "unit", "one", "a_log", "dt_bias"]
"""How random weights fill a tensor: variance 1 / (last dimension), variance 1, all ones, log(1..S) in every row, or
such that softplus gives time steps from 0.001 to 0.1 (Gu & Dao 2023, section 3.6)."""


class Destination(NamedTuple):
    """Memory that one tensor of the checkpoint fills: a view, shaped as the tensor is on disk, of any stride."""

    data: Tensor
    fill: Fill


class Fused(NamedTuple):
    """Another layout's tensor that fills several destinations (by name) at once."""

    data: Tensor
    parts: tuple[str, ...]


def part(raw: Weight, index: int | slice) -> Weight:
    """A view of some rows, or of one matrix of several."""
    if isinstance(raw, Tensor):
        return raw[index]
    return raw._replace(values=raw.values[index], scales=raw.scales[index])


def matrix(name: str, raw: Weight) -> dict[str, Destination]:
    """Where the tensors of the linear module `name` go: its weight, and the scales of one that is quantised on disk."""
    if isinstance(raw, Tensor):
        return {f"{name}.weight": Destination(raw, "normed")}
    return {f"{name}.weight": Destination(raw.values, "normed"), f"{name}.weight_scale": Destination(raw.scales, "one")}


def keep() -> None:
    """The `pack` of weights that stay as they are loaded."""


class Unit(NamedTuple):
    """Tensors that become one thing of the kernels' when all of them are filled: then `pack` is called, once, and lets
    the raw ones go, for which nobody else may hold these destinations any longer.

    By name on disk. Each of `destinations` must be filled, once, by its own tensor or as part of a `fused` one.
    """

    destinations: Mapping[str, Destination]
    pack: Callable[[], None] = keep
    fused: Mapping[str, Fused] = {}


Units = Iterator[Unit]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """All that a checkpoint may hold; tensors named in `ignored` are known to be of no use."""

    units: tuple[Unit, ...]
    ignored: frozenset[str]

    @property
    def destinations(self) -> dict[str, Destination]:
        return {name: destination for unit in self.units for name, destination in unit.destinations.items()}


@dataclass(frozen=True, slots=True)
class Backend:
    """Where a model lives, what computes it, and which of its weights are quantised."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    policy: QuantizationPolicy

    def raw(self, role: Role, *shape: int) -> Weight:
        """Uninitialised memory for a matrix as it is on disk: where it becomes a smaller one, not on the device."""
        host = self.device if self.device.type == "meta" else torch.device("cpu")
        if role in self.policy.stored:
            values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=host)
            return QuantizedWeight(values, torch.empty(*shape[:-1], 1, device=host), group_size=shape[-1], bits=8)
        on_host = self.policy.quantization_of(role) is not None
        return torch.empty(shape, dtype=self.dtype, device=host if on_host else self.device)

    def quantize(self, role: Role, weight: Weight) -> Weight:
        """A filled raw weight as the kernels take it, on the device: quantised, or as it is."""
        if isinstance(weight, QuantizedWeight):
            return weight._replace(values=weight.values.to(self.device), scales=weight.scales.to(self.device))
        quantization = self.policy.quantization_of(role)
        return weight if quantization is None else quantize(weight.to(self.device), quantization)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised weights; on a CPU their memory is not taken before they are written."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
