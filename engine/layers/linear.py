"""Linear: one matrix product for one or several projections of the same input."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, Final

from torch import Tensor

from jamba_server.engine.layers.parameter import Backend, Destination, Raw, Unit, part
from jamba_server.engine.pieces import Piece
from jamba_server.engine.quantization import Role
from jamba_server.kernels.gated_linear import GatedLinear
from jamba_server.kernels.ops import SiluAndMul, StackedWeight

WHOLE_TENSORS: Final[Mapping[str, Piece | None]] = {}


class Linear:
    """Multiplies x [T, K] by a weight matrix and returns the product [T, N]. The argument `parts` maps the name that
    each projection has on disk to the projection's number of outputs. The outputs of all projections are concatenated;
    N is the total number of outputs.

    The argument `role` names the part of the model that contains the weight; this name decides whether the weight is
    quantised. If another layer owns and loads the weight, the argument `shared` is this weight, and the loading `Unit`
    of the owner must call `pack` of this layer.

    If the outputs of projections are divided among ranks, `parts` has the numbers of outputs of this rank, and `pieces`
    the rows of their weights.
    """

    def __init__(
        self,
        backend: Backend,
        in_features: int,
        parts: Mapping[str, int],
        *,
        role: Role,
        bias: bool = False,
        shared: Raw | None = None,
        pieces: Mapping[str, Piece | None] = WHOLE_TENSORS,
    ) -> None:
        self._backend = backend
        self._role: Role = role
        self._linear = linear = backend.linear(role)
        self._gated = linear.gated if isinstance(linear, GatedLinear) else None
        self._parts, self._pieces, self.is_shared = dict(parts), pieces, shared is not None
        # The raw weights: one for all neighbouring projections that have the same format in memory.
        self._raw: list[tuple[list[str], Raw]] = [(list(parts), shared)] if shared is not None else []
        if shared is None:
            for form, names in groupby(parts, key=lambda name: backend.format(f"{name}.weight")):
                own = list(names)
                rows = sum(parts[name] for name in own)
                self._raw.append((own, backend.raw(role, rows, in_features, stored=form)))
        self._weight: Any = None  # set by `pack`, in the layout that the kernel needs
        self._bias = backend.empty(sum(parts.values())) if bias else None

    @property
    def is_quantized(self) -> bool:
        """Returns whether this server itself quantises the weight, or the checkpoint has quantised all weights of this
        part of the model in the same way."""
        return self._backend.policy.quantization_of(self._role) is not None

    @property
    def weight(self) -> Any:
        """Returns the weight in the layout that the kernel needs, or None before the method `pack` has run. Fused
        operations, which compute this matrix product among other work, take the weight as an argument."""
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias)

    def gated(self, x: Tensor, activation: SiluAndMul) -> Tensor:
        """Returns activation(self(x)), in one kernel where the implementation of the product has one. There must be no
        bias."""
        if self._gated is None:
            return activation(self(x))
        return self._gated(x, self._weight, activation)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Splits the output [T, N] into one view for each projection. The row stride of each view is N."""
        return y.split(list(self._parts.values()), dim=-1)

    def unit(self, prefix: str) -> Unit:
        assert not self.is_shared, "a shared weight is loaded by the layer that owns it"
        destinations: dict[str, Destination] = {}
        for names, raw in self._raw:
            start = 0
            for name in names:
                rows = slice(start, start := start + self._parts[name])
                destinations |= self._backend.matrix(f"{prefix}{name}", part(raw, rows), self._pieces.get(name))
        if self._bias is not None:
            biases = zip(self._parts, self._bias.split(list(self._parts.values())), strict=True)
            destinations |= {
                f"{prefix}{name}.bias": Destination(bias, "normed", self._pieces.get(name)) for name, bias in biases
            }
        return Unit(destinations, self.pack)

    def pack(self) -> None:
        """Quantises the weight if the policy says so, and converts it to the kernel's layout. Call it once, after the
        weight is filled."""
        parts: list[Raw] = []
        while self._raw:  # each turn drops the last reference to a raw weight that is quantised
            parts.append(self._backend.quantize(self._role, self._raw.pop(0)[1]))
        self._weight = self._linear.pack(parts[0] if len(parts) == 1 else StackedWeight(tuple(parts)))
