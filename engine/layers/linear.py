"""Linear: one matrix product for one or several projections of the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jamba_server.engine.layers.parameter import Backend, Destination, Unit, matrix, part
from jamba_server.engine.quantization import Role
from jamba_server.kernels.ops import Weight


class Linear:
    """Multiplies x [T, K] by a weight matrix and returns the product [T, N]. The argument `parts` maps the name that
    each projection has on disk to the projection's number of outputs. The outputs of all projections are concatenated;
    N is the total number of outputs.

    The argument `role` names the part of the model that contains the weight; this name decides whether the weight is
    quantised. If another layer owns and loads the weight, the argument `shared` is this weight, and the loading `Unit`
    of the owner must call `pack` of this layer.
    """

    def __init__(
        self,
        backend: Backend,
        in_features: int,
        parts: Mapping[str, int],
        *,
        role: Role,
        bias: bool = False,
        shared: Tensor | None = None,
    ) -> None:
        self._backend = backend
        self._role: Role = role
        self._linear = backend.kernels.linear
        self._parts, self.is_shared = dict(parts), shared is not None
        rows = sum(parts.values())
        # After the method `pack` has run, the weight is an object in the layout that the kernel needs.
        self._weight: Any = self._raw(rows, in_features) if shared is None else shared
        self._bias = backend.empty(rows) if bias else None

    def _raw(self, rows: int, in_features: int) -> Weight:
        formats = self._backend.formats([f"{name}.weight" for name in self._parts])
        return self._backend.raw(self._role, rows, in_features, stored=formats[0] if formats else None)

    @property
    def is_quantized(self) -> bool:
        return self._backend.policy.quantization_of(self._role) is not None

    @property
    def weight(self) -> Any:
        """Returns the weight. After the method `pack` has run, the weight is in the layout that the kernel needs. Fused
        operations, which compute this matrix product among other work, take the weight as an argument."""
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Splits the output [T, N] into one view for each projection. The row stride of each view is N."""
        return y.split(list(self._parts.values()), dim=-1)

    def unit(self, prefix: str) -> Unit:
        assert not self.is_shared, "a shared weight is loaded by the layer that owns it"
        destinations: dict[str, Destination] = {}
        start = 0
        for name, rows in self._parts.items():
            destinations |= matrix(f"{prefix}{name}", part(self._weight, slice(start, start + rows)))
            if self._bias is not None:
                destinations[f"{prefix}{name}.bias"] = Destination(self._bias[start : start + rows], "normed")
            start += rows
        return Unit(destinations, self.pack)

    def pack(self) -> None:
        """Quantises the weight if the policy says so, and converts it to the kernel's layout. Call it once, after the
        weight is filled."""
        weight, self._weight = self._weight, None
        weight = self._backend.quantize(self._role, weight)  # the call drops the last reference to the raw weight
        self._weight = self._linear.pack(weight)
