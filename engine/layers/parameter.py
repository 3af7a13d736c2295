"""The interface between layers and the weight loader: layers tell the loader which memory each checkpoint tensor
fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.quantization import FORMATS, Format, QuantizationPolicy, Role
from jamba_server.engine.quantization.blocks import shared_formats
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.kernels.ops import Kernels, QuantizedWeight, Weight

Fill = Literal["normed", "unit", "one", "a_log", "dt_bias"]
"""The ways to fill a tensor with dummy weights. "normed": random with variance 1 / (size of the last dimension).
"unit": random with variance 1. "one": ones. "a_log": log(1), ..., log(S) in every row. "dt_bias": random such that its
softplus is a time step between 0.001 and 0.1 (Gu & Dao 2023, section 3.6)."""


class Destination(NamedTuple):
    """The memory that one checkpoint tensor fills. `data` is a view of this memory. The view has the shape of the
    tensor on disk. The strides of the view are arbitrary."""

    data: Tensor
    fill: Fill


class Fused(NamedTuple):
    """The memory that one checkpoint tensor fills if it holds several weights, for example the down projections of all
    experts. `data` is a view of this memory, and `parts` are the names of the weights that together take this
    memory."""

    data: Tensor
    parts: tuple[str, ...]


def part(raw: Weight, index: int | slice) -> Weight:
    """Returns a view of a weight that is not packed yet: a slice of the rows of a matrix, or one matrix of a stack of
    matrices."""
    if isinstance(raw, Tensor):
        return raw[index]
    return raw._replace(values=raw.values[index], scales=raw.scales[index])


def matrix(name: str, raw: Weight) -> dict[str, Destination]:
    """Returns a map from tensor names to the memory that the weight loader fills for the linear module `name`. The map
    has the weight and, if this weight is quantised on disk, its scales."""
    if isinstance(raw, Tensor):
        return {f"{name}.weight": Destination(raw, "normed")}
    return {f"{name}.weight": Destination(raw.values, "normed"), f"{name}.weight_scale": Destination(raw.scales, "one")}


def leave_unpacked() -> None:
    """Does nothing. This function takes the place of a packing function for weights that the kernels use in the form in
    which they are loaded."""


class Unit(NamedTuple):
    """A group of weights that one call of `pack` converts to the layout of a kernel. Each weight is found by its name
    on disk.

    Each weight in `destinations` must be filled exactly once: by the checkpoint tensor of its name, or by a checkpoint
    tensor named in `fused`, which fills several weights. When all destinations are filled, `pack` is called once.
    `pack` frees the raw weights, so no other object is allowed to hold a reference to the raw weights when `pack` is
    called.
    """

    destinations: Mapping[str, Destination]
    pack: Callable[[], None] = leave_unpacked
    fused: Mapping[str, Fused] = {}


Units = Iterator[Unit]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """All tensors that a checkpoint may contain. Tensors named in `ignored` are accepted but not used."""

    units: tuple[Unit, ...]
    ignored: frozenset[str]

    @property
    def destinations(self) -> dict[str, Destination]:
        return {name: destination for unit in self.units for name, destination in unit.destinations.items()}


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels that compute a model, the model's dtype and device, and the policy that says which of the model's
    weights are quantised. `prefix` is the part that the names of all weights of a layer begin with."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    policy: QuantizationPolicy
    prefix: str = ""

    def under(self, prefix: str) -> Backend:
        """Returns a copy of this backend for the part of the model whose weights have names that begin with
        `prefix`."""
        return replace(self, prefix=prefix)

    def formats(self, *products: Sequence[str]) -> tuple[Format, ...] | None:
        """Returns the formats of matrix products that one kernel computes together, if their weights are kept in the
        quantised blocks of the checkpoint. Otherwise returns None. `products` lists the names of each product's
        weights, without `prefix`."""
        names = [[f"{self.prefix}{name}" for name in product] for product in products]
        return shared_formats(self.policy.blocks, names)

    def raw(self, role: Role, *shape: int, stored: Format | None = None) -> Weight:
        """Returns uninitialised memory for a matrix as the checkpoint stores it. If `stored` is not None, that is the
        format of the stored matrix. The memory is on the host if the matrix is quantised on disk or will be quantised,
        so that the device holds only the quantised matrix."""
        host = self.device if self.device.type == "meta" else torch.device("cpu")
        if stored is not None:
            return self._quantized(stored, shape)
        if role in self.policy.stored:
            quantization = self.policy.quantization_of(role)
            assert quantization is not None, "stored weights have a format"
            return self._quantized(FORMATS[quantization], shape, fp8=quantization == "fp8")
        on_host = self.policy.quantization_of(role) is not None
        return torch.empty(shape, dtype=self.dtype, device=host if on_host else self.device)

    def _quantized(self, form: Format, shape: Sequence[int], *, fp8: bool = False) -> QuantizedWeight:
        """Returns uninitialised memory on the host for a weight that is quantised on disk."""
        host = self.device if self.device.type == "meta" else torch.device("cpu")
        size = form.group_size or shape[-1]
        values = torch.empty(*shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8, device=host)
        scales = torch.empty(*shape[:-1], -(-shape[-1] // size), device=host)
        return QuantizedWeight(values, scales, group_size=size, bits=form.bits)

    def quantize(self, role: Role, weight: Weight) -> Weight:
        """Takes a raw weight that has been filled, and returns the weight on the device in the form that kernels take.
        The weight is quantised if the policy says so."""
        if isinstance(weight, QuantizedWeight):
            return weight._replace(values=weight.values.to(self.device), scales=weight.scales.to(self.device))
        quantization = self.policy.quantization_of(role)
        return weight if quantization is None else quantize(weight.to(self.device), quantization)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns an uninitialised weight. On a CPU the weight takes physical memory only once it is written."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
