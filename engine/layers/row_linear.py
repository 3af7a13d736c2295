"""RowLinear: one matrix product whose inputs are divided among ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Raw, Unit
from jamba_server.engine.parallel.shards import Own
from jamba_server.engine.pieces import Piece, section
from jamba_server.engine.quantization import Role


class RowLinear:
    """Multiplies x [T, K] by a weight matrix [N, K] called `name` and returns the product [T, N], which is the same on
    all ranks. Each rank has its own inputs and their columns of the matrix; `own` says which.

    In exact mode, the product is summed in sections of the inputs, as `engine.parallel.shards` explains.
    """

    def __init__(
        self, backend: Backend, own: Own, name: str, out_features: int, *, role: Role, bias: bool = False
    ) -> None:
        self._backend, self._own, self._name, self._out_features = backend, own, name, out_features
        self._role: Role = role
        self._linear = backend.linear(role)
        self._raw: Raw | None = backend.raw(role, out_features, len(own), stored=backend.format(f"{name}.weight"))
        self._bias = backend.empty(out_features) if bias else None
        self._sections: list[tuple[int, int]] = []
        self._weights: list[Any] = []  # one packed matrix for each section, or one for all inputs

    def __call__(self, x: Tensor) -> Tensor:
        group = self._backend.group
        if not self._backend.parts.shard.exact:
            y = group.add(self._linear(x, self._weights[0]))
            return y if self._bias is None else y + self._bias
        sums = torch.empty(len(self._weights), len(x), self._out_features, dtype=torch.float32, device=x.device)
        for (start, stop), weight, out in zip(self._sections, self._weights, sums, strict=True):
            if weight is None:
                out.zero_()
            else:
                self._linear.sums(x[:, start:stop], weight, out)
        y = group.add_sections(sums, x.dtype)
        return y if self._bias is None else y + self._bias

    def unit(self, prefix: str) -> Unit:
        assert self._raw is not None, "the weights are not packed yet"
        destinations = self._backend.matrix(f"{prefix}{self._name}", self._raw, Piece.of(self._own, 1))
        if self._bias is not None:
            destinations[f"{prefix}{self._name}.bias"] = Destination(self._bias, "normed")
        return Unit(destinations, self.pack)

    def pack(self) -> None:
        """Quantises the weight if the policy says so, and converts it to the kernel's layout. Call it once, after the
        weight is filled, on all ranks in the same order."""
        raw, self._raw = self._raw, None
        assert raw is not None, "a weight is packed once"
        weight = self._backend.quantize(self._role, raw, divided=True)
        if not self._backend.parts.shard.exact:
            self._weights = [self._linear.pack(weight)]
            return
        self._sections = list(self._own.sections)
        for start, stop in self._sections:
            self._weights.append(self._linear.pack(section(weight, start, stop)) if start < stop else None)


def row_linear(
    backend: Backend, own: Own, name: str, out_features: int, *, role: Role, bias: bool = False
) -> Linear | RowLinear:
    """Returns the product with a matrix whose inputs are divided among ranks, which is a plain product on one rank."""
    if not backend.divides_sums:
        return Linear(backend, own.total, {name: out_features}, role=role, bias=bias)
    return RowLinear(backend, own, name, out_features, role=role, bias=bias)
