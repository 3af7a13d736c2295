"""Makes the matrix products of a model use activations of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from jamba_server.kernels.cpu import a8 as cpu_a8
from jamba_server.kernels.int8_activations import Kind
from jamba_server.kernels.ops import Kernels, Linear
from jamba_server.kernels.reference import a8 as reference_a8


class _Products(NamedTuple):
    """The classes that add 8-bit activations to the operations `linear` and `run_experts` of one implementation. Each
    takes the operation that computes all other products, and the kinds of weights that it handles."""

    linear: Callable[[Any, frozenset[Kind]], Any]
    run_experts: Callable[[Any, frozenset[Kind]], Any]


PRODUCTS: Final[Mapping[str, _Products]] = {
    "cpu": _Products(cpu_a8.Linear, cpu_a8.RunExperts),
    "reference": _Products(reference_a8.Linear, reference_a8.RunExperts),
}
"""Maps the name of an implementation of `linear` and `run_experts` to its products with 8-bit activations."""


def without_int8(names: Mapping[str, str]) -> list[str]:
    """Returns the operations, as "operation=implementation", whose implementation has no products with 8-bit
    activations. `names` maps each operation to the name of its implementation."""
    return [f"{op}={names[op]}" for op in ("linear", "run_experts") if names[op] not in PRODUCTS]


def with_int8_activations(kernels: Kernels, kinds: frozenset[Kind]) -> Kernels:
    """Returns kernels whose products with quantised weights use 8-bit activations if the weights are of these kinds
    (`kernels.int8_activations.int8_parts`). All other products stay as they are.

    Products of different implementations give the same bits, except that experts apply their own implementation of the
    activation function.
    """
    assert not without_int8(kernels.names), "the implementations have products with 8-bit activations"
    linear, experts = (PRODUCTS[kernels.names[op]] for op in ("linear", "run_experts"))
    return replace(
        kernels,
        linear=linear.linear(kernels.linear, kinds),
        run_experts=experts.run_experts(kernels.run_experts, kinds),
    )


def without_int8_activations(linear: Linear) -> Linear:
    """Returns the operation `linear` of kernels with 8-bit activations, or of any others, with activations of the
    model's dtype."""
    return linear.other if isinstance(linear, cpu_a8.Linear | reference_a8.Linear) else linear
