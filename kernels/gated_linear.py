"""This module says what a `Linear` may offer beside the methods of its protocol: a product with its activation."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from jamba_server.kernels.ops import SiluAndMul


@runtime_checkable
class GatedLinear(Protocol):
    """A `Linear` that can also compute the activation of a gated MLP in the kernel of the product before it."""

    def gated(self, x: Tensor, weight: Any, activation: SiluAndMul) -> Tensor:
        """Returns activation(x @ weight.T), with the same bits: dtype [T, F].

        x: dtype [T, K]; weight: a packed weight [2F, K], the gate and then the up projection. Another activation than
        the one that this implementation knows is called after the product.
        """
        ...
