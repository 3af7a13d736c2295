"""The emulation of the instruction BFMMLA of ARM, which runs on every machine. `tests/kernels/arm` compares it with the
instruction as qemu emulates it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import NEON_EMULATED, library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.kernels.table import select
from tests.kernels.cases import assert_same, random

SMALLEST, LARGEST = -126, 127  # exponents of float32 numbers that are neither subnormal nor infinite


@pytest.fixture(autouse=True)
def _compiled() -> None:  # pyright: ignore[reportUnusedFunction]
    try:
        library()
    except KernelUnavailable as error:
        pytest.skip(str(error))


def to_odd(exact: Fraction) -> Fraction:
    """The float32 number whose last bit is 1 of the two that are next to an inexact result; 0 instead of subnormal."""
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() if exact else SMALLEST - 1
    exponent -= magnitude < Fraction(2) ** exponent
    if exponent < SMALLEST:
        return Fraction(0)
    assert exponent <= LARGEST
    unit = Fraction(2) ** (exponent - 23)
    steps = magnitude // unit
    steps |= steps * unit != magnitude
    return steps * unit * (1 if exact > 0 else -1)


def flushed(x: float) -> Fraction:
    return Fraction(x) if abs(x) >= 2.0**SMALLEST else Fraction(0)


def instruction(x: list[float], weights: list[float]) -> Fraction:
    """BFMMLA over the steps of one row and one column, as ARM defines it: pair by pair, and each sum rounded to odd."""
    total = Fraction(0)
    products = [to_odd(flushed(a) * flushed(b)) for a, b in zip(x, weights, strict=True)] + [Fraction(0)]
    for first, second in zip(products[::2], products[1::2], strict=False):
        total = to_odd(total + to_odd(first + second))
    return total


def cancelling(inputs: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, K], weights [N, K] and their products, which are the last bits of float32 sums: the last two inputs
    subtract all that bf16 can hold of the sum before. So rounding the result to bf16 loses nothing."""
    x = random(1, inputs, dtype=torch.bfloat16, scale=scale)
    weight = random(33, inputs, dtype=torch.bfloat16, seed=1)
    columns: list[list[float]] = []
    for column in weight.tolist():
        total = instruction(x[0].tolist(), column)
        high = torch.tensor(float(total)).bfloat16().item()
        low = torch.tensor(float(total - Fraction(high))).bfloat16().item()
        columns.append([*column, -high, -low])
    x, weight = torch.cat([x, torch.ones(1, 2, dtype=x.dtype)], dim=1), torch.tensor(columns).bfloat16()
    expected = [[float(instruction(x[0].tolist(), column)) for column in weight.tolist()]]
    return x, weight, torch.tensor(expected).bfloat16()


@pytest.mark.parametrize(("inputs", "scale"), [(30, 1.0), (64, 1.0), (300, 1.0), (62, 1e-33)])
def test_the_emulation_does_what_the_instruction_is_documented_to_do(inputs: int, scale: float) -> None:
    """With the scale 1e-33, some differences would be subnormal."""
    linear = Linear(level=NEON_EMULATED)
    x, weight, expected = cancelling(inputs, scale)
    assert expected.count_nonzero() > 3
    assert_same(linear(x, linear.pack(weight)), expected)


@pytest.mark.parametrize("inputs", [1, 2, 3, 5])
def test_inputs_that_are_no_multiple_of_4(inputs: int) -> None:
    linear = Linear(level=NEON_EMULATED)
    x, weight = (random(3, inputs, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    expected = [[float(instruction(row, column)) for column in weight.tolist()] for row in x.tolist()]
    assert_same(linear(x, linear.pack(weight)), torch.tensor(expected).to(torch.bfloat16))


def test_subnormal_numbers_count_as_zero() -> None:
    linear = Linear(level=NEON_EMULATED)
    x = torch.tensor([[2.0**-130, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[2.0**120, 0.0], [0.0, 2.0**-130], [2.0**120, 1.0]], dtype=torch.bfloat16)
    assert linear(x, linear.pack(weight))[0].tolist() == [0.0, 0.0, 1.0]


def test_infinities_and_nan() -> None:
    linear = Linear(level=NEON_EMULATED)
    x = torch.tensor([[2.0**100, 2.0**100], [2.0**100, torch.inf], [torch.nan, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[2.0**100, 0.0], [1.0, -1.0], [2.0**27, 2.0**27]], dtype=torch.bfloat16)
    found = linear(x, linear.pack(weight))
    expected = [[torch.inf, 0.0, torch.inf], [torch.nan, -torch.inf, torch.inf], [torch.nan] * 3]
    assert_same(found, torch.tensor(expected).bfloat16())


def test_the_level_is_forced_for_linear_and_experts_together() -> None:
    kernels = select("cpu", {"linear": f"cpu:{NEON_EMULATED}"})
    x, gate_up = random(5, 96, dtype=torch.bfloat16), random(1, 64, 96, dtype=torch.bfloat16, seed=2)
    down, forced = random(1, 96, 32, dtype=torch.bfloat16, seed=3), kernels.linear
    out = kernels.run_experts(
        x, kernels.run_experts.pack(gate_up, down), torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32)
    )
    expected = forced(kernels.silu_and_mul(forced(x, forced.pack(gate_up[0]))), forced.pack(down[0]))
    assert_same(out, expected)
