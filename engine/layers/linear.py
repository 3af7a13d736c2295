"""Linear: a matrix product with the weights of one or several projections of the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.layers.parameter import Backend, Destination, Destinations


class Linear:
    """x [T, K] -> [T, N]. `parts` maps each projection's name on disk to its rows; their outputs lie side by side.

    `shared` is a weight that another layer owns and loads.
    """

    def __init__(
        self,
        backend: Backend,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        shared: Tensor | None = None,
    ) -> None:
        self._linear = backend.kernels.linear
        self._parts, self._shared = dict(parts), shared is not None
        rows = sum(parts.values())
        # the kernel's own layout after `pack`
        self._weight: Any = backend.empty(rows, in_features) if shared is None else shared
        self._bias = backend.empty(rows) if bias else None

    @property
    def weight(self) -> Any:
        """What an op that does this product among others takes: after `pack`, the kernel's own layout."""
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The projections' own outputs: views whose rows are apart by all of N."""
        return y.split(list(self._parts.values()), dim=-1)

    def destinations(self, prefix: str) -> Destinations:
        if self._shared:
            return
        start = 0
        for name, rows in self._parts.items():
            yield f"{prefix}{name}.weight", Destination(self._weight[start : start + rows], "normed")
            if self._bias is not None:
                yield f"{prefix}{name}.bias", Destination(self._bias[start : start + rows], "normed")
            start += rows

    def pack(self) -> None:
        self._weight = self._linear.pack(self._weight)
