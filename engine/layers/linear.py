"""Linear: a matrix product with the weights of one or several projections of the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from jamba_server.engine.layers.parameter import Backend, Destination, Unit, matrix, part
from jamba_server.engine.quantization import Role


class Linear:
    """x [T, K] -> [T, N]. `parts` maps each projection's name on disk to its rows; their outputs lie side by side.

    `role` decides whether the weight is quantised. `shared` is a weight that another layer owns and loads; whose
    unit then packs this one, too.
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
        # the kernel's own layout after `pack`
        self._weight: Any = backend.raw(role, rows, in_features) if shared is None else shared
        self._bias = backend.empty(rows) if bias else None

    @property
    def is_quantized(self) -> bool:
        return self._backend.policy.quantization_of(self._role) is not None

    @property
    def weight(self) -> Any:
        """What an op that does this product among others takes: after `pack`, the kernel's own layout."""
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The projections' own outputs: views whose rows are apart by all of N."""
        return y.split(list(self._parts.values()), dim=-1)

    def unit(self, prefix: str) -> Unit:
        assert not self.is_shared, "its owner loads it"
        destinations: dict[str, Destination] = {}
        start = 0
        for name, rows in self._parts.items():
            destinations |= matrix(f"{prefix}{name}", part(self._weight, slice(start, start + rows)))
            if self._bias is not None:
                destinations[f"{prefix}{name}.bias"] = Destination(self._bias[start : start + rows], "normed")
            start += rows
        return Unit(destinations, self.pack)

    def pack(self) -> None:
        """Once, when the weight is filled."""
        weight, self._weight = self._weight, None
        weight = self._backend.quantize(self._role, weight)  # the raw one is let go before it is packed
        self._weight = self._linear.pack(weight)
