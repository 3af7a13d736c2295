"""The interface between layers and the weight loader: layers tell the loader which memory each checkpoint tensor
fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.parallel.group import ALONE, Group
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.parallel.stages import Stage
from jamba_server.engine.pieces import Piece
from jamba_server.engine.quantization import FORMATS, Format, QuantizationPolicy, Role
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.engine.quantization.stored import empty
from jamba_server.kernels.activations import without_int8_activations
from jamba_server.kernels.ops import Kernels, Linear, QuantizedWeight

Fill = Literal["normed", "unit", "one", "a_log", "dt_bias"]
"""The ways to fill a tensor with dummy weights. "normed": random with variance 1 / (size of the last dimension).
"unit": random with variance 1. "one": ones. "a_log": log(1), ..., log(S) in every row. "dt_bias": random such that its
softplus is a time step between 0.001 and 0.1 (Gu & Dao 2023, section 3.6)."""


Raw = Tensor | QuantizedWeight
"""A weight that is not packed yet."""


Drawn = dict[int, Tensor]
"""Dummy weights that were drawn on the device, although the memory that they should fill is on the host: maps the
address of that memory to a tensor on the device with as many elements."""


class Destination(NamedTuple):
    """The memory that one checkpoint tensor fills. `data` is a view of this memory. The view has the shape of the
    tensor on disk, or of the `piece` of this tensor that a rank loads. The strides of the view are arbitrary. A
    QuantizedWeight is filled by one quantised matrix of the checkpoint."""

    data: Raw
    fill: Fill
    piece: Piece | None = None

    @property
    def tensor(self) -> Tensor:
        """The view of a weight that is not quantised in the checkpoint."""
        assert isinstance(self.data, Tensor), "the weight is not quantised in the checkpoint"
        return self.data

    @property
    def shape(self) -> torch.Size:
        """The shape of the memory."""
        return self.data.shape if isinstance(self.data, Tensor) else self.data.values.shape


class Fused(NamedTuple):
    """The memory that one checkpoint tensor fills if it holds several weights, for example the down projections of all
    experts. `data` is a view of this memory, and `parts` are the names of the weights that together take this
    memory. A rank may load only a `piece` of the tensor."""

    data: Tensor
    parts: tuple[str, ...]
    piece: Piece | None = None


def part(raw: Raw, index: int | slice) -> Raw:
    """Returns a view of a weight that is not packed yet: a slice of the rows of a matrix, or one matrix of a stack of
    matrices."""
    return raw[index] if isinstance(raw, Tensor) else raw.each(lambda tensor: tensor[index])


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
    """All tensors that a checkpoint may contain. Tensors named in `ignored` are accepted but not used, and so are those
    that another `stage` loads. `drawn` is that of the model's `Backend`."""

    units: tuple[Unit, ...]
    ignored: frozenset[str]
    stage: Stage
    drawn: Drawn = field(default_factory=dict[int, Tensor])

    @property
    def destinations(self) -> dict[str, Destination]:
        return {name: destination for unit in self.units for name, destination in unit.destinations.items()}


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels that compute a model, the model's dtype and device, and the policy that says which of the model's
    weights are quantised. `parts` says what this rank owns of the model, and `group` has all ranks. `prefix` is the
    part that the names of all weights of a layer begin with. `drawn` takes the place of raw weights on the host, if
    they are dummies that were drawn on the device."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    policy: QuantizationPolicy
    parts: Parts
    group: Group = ALONE
    prefix: str = ""
    drawn: Drawn = field(default_factory=dict[int, Tensor])

    @property
    def divides_sums(self) -> bool:
        """Returns whether products are summed in sections or by several ranks, so that they take more than one call of
        a kernel."""
        return self.parts.divides_sums

    def under(self, prefix: str) -> Backend:
        """Returns a copy of this backend for the part of the model whose weights have names that begin with
        `prefix`."""
        return replace(self, prefix=prefix)

    def linear(self, role: Role) -> Linear:
        """Returns the operation that multiplies by the weights of a part of the model. The matrices x_proj, dt_proj and
        the router are never multiplied by activations of 8 bits: they are small, and rounding errors in their products
        would change the model's outputs strongly."""
        return without_int8_activations(self.kernels.linear) if role == "other" else self.kernels.linear

    def format(self, name: str) -> Format | None:
        """Returns the format in which the weight `name` stays as the checkpoint stores it, or None if this is no such
        weight. The name lacks `prefix`."""
        return self.policy.blocks.get(f"{self.prefix}{name}")

    def raw(self, role: Role, *shape: int, stored: Format | None = None) -> Raw:
        """Returns uninitialised memory for a matrix as the checkpoint stores it. If `stored` is not None, that is the
        format in which the matrix stays. The memory is on the host if the matrix is quantised on disk or will be
        quantised, so that the device holds only the quantised matrix."""
        host = self.device if self.device.type == "meta" else torch.device("cpu")
        if stored is not None:
            return empty(stored, shape, host)
        quantization = self.policy.quantization_of(role)
        if role in self.policy.stored:
            assert quantization is not None, "stored weights have a format"
            raw = empty(FORMATS[quantization], shape, host)
            return raw._replace(values=raw.values.view(torch.float8_e4m3fn)) if quantization == "fp8" else raw
        return torch.empty(shape, dtype=self.dtype, device=self.device if quantization is None else host)

    def matrix(self, name: str, raw: Raw, piece: Piece | None = None) -> dict[str, Destination]:
        """Returns a map from tensor names to the memory that the weight loader fills for the linear module `name`. In a
        checkpoint whose policy has `stored` roles, the scales of a quantised weight are a tensor of their own."""
        if isinstance(raw, Tensor) or not self.policy.stored:
            return {f"{name}.weight": Destination(raw, "normed", piece)}
        values = Destination(raw.values, "normed", piece)
        scales = Destination(raw.scales, "one", piece and piece.grouped(self._stored_group(raw, piece)))
        return {f"{name}.weight": values, f"{name}.weight_scale": scales}

    def _stored_group(self, raw: QuantizedWeight, piece: Piece) -> int:
        """Returns the number of inputs that share a scale in a file."""
        return piece.size if raw.scales.shape[-1] == 1 and piece.dim == 1 else raw.group_size

    def quantize(self, role: Role, weight: Raw, *, divided: bool = False) -> Raw:
        """Takes a raw weight that has been filled, and returns the weight on the device in the form that kernels take.
        The weight is quantised if the policy says so. If its inputs are `divided` among ranks, all ranks must call this
        together: a scale of a whole row is that of the row of all ranks."""
        if isinstance(weight, QuantizedWeight):
            return weight.each(lambda tensor: tensor.to(self.device))
        quantization = self.policy.quantization_of(role)
        if quantization is None:
            return weight
        weight, largest = self._on_device(weight), None
        if divided and self.group.shard.size > 1 and FORMATS[quantization].group_size is None:
            largest = self.group.maximum(torch.maximum(weight.amax(-1), -weight.amin(-1)).float().flatten())
        return quantize(weight, quantization, largest)

    def _on_device(self, weight: Tensor) -> Tensor:
        """Returns a raw weight on the device. Drops the entry of `drawn`, so that the memory is freed when the caller
        has quantised the weight."""
        drawn = self.drawn.pop(weight.untyped_storage().data_ptr(), None) if self.drawn else None
        return weight.to(self.device) if drawn is None else drawn.as_strided(weight.shape, weight.stride())

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns an uninitialised weight. On a CPU the weight takes physical memory only once it is written."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
