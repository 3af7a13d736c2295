"""RmsNorm: root mean square layer normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

from torch import Tensor

from jamba_server.engine.layers.parameter import Backend, Destination, Unit


class RmsNorm:
    """Normalises each row of x [T, size]. The method `add` first adds the residual stream to x, and returns two
    tensors: the normalised sum and the sum itself."""

    def __init__(self, backend: Backend, size: int, eps: float) -> None:
        self._rms_norm = backend.kernels.rms_norm
        self.weight = backend.empty(size)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self.weight, self._eps)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._rms_norm(x, self.weight, self._eps, residual)

    def unit(self, name: str) -> Unit:
        return Unit({f"{name}.weight": Destination(self.weight, "one")})
