"""Products with 8-bit activations: the reference against exact arithmetic, the compiled code against the reference, to
the bit."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.a8 import UNITS, Linear, RunExperts, StackedA8, units_of
from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.cpu.linear import Linear as PlainLinear
from jamba_server.kernels.cpu.moe import RunExperts as PlainExperts
from jamba_server.kernels.cpu.moe import SiluAndMul
from jamba_server.kernels.int8_activations import Kind
from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight
from jamba_server.kernels.reference import a8 as reference
from jamba_server.kernels.reference.linear import Linear as PlainReference
from jamba_server.kernels.reference.moe import RunExperts as PlainReferenceExperts
from tests.kernels.cases import LEVELS, assert_close, assert_same, double, random
from tests.kernels.test_formats import FORMATS, weight_of
from tests.kernels.test_quantized import EXPERTS, HIDDEN, INNER, ROW, experts_case, formula, quantized

GROUPS = [("int4", 16), ("int4", 32), ("int4", 128), ("int4", ROW), ("int8", 16), ("int8", 64), ("int8", ROW)]
SHAPES = [(1, 1), (35, 33), (70, 261), (33, 300)]
FORMS = [name for name in FORMATS if name != "NF4"]  # whose table has no whole numbers
ROWS = (1, 2, 3, 4, 5, 8, 9, 12, 31, 64)


def compiled() -> Linear:
    return Linear(PlainLinear())


def expected(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    linear = reference.Linear(PlainReference())
    return linear(x, linear.pack(weight), bias)


def test_fused_products_are_rounded_once() -> None:
    """Doubles would round these sums twice: the sum lies just beside the middle between two float32 numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2000, generator=generator) for _ in range(3))
    step = 2.0**-23 * torch.randint(1, 99, (500,), generator=generator)
    a[:500], b[:500] = 1 + step, 2.0**-24 * (1 - step)
    c[:500] = 1 + 2.0**-23 * torch.randint(0, 99, (500,), generator=generator)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(t.tolist() for t in (a, b, c)), strict=True)]
    for result, value in zip(reference.fused(a, b, c).numpy(), exact, strict=True):
        neighbours = [result, np.nextafter(result, np.float32(-9e9)), np.nextafter(result, np.float32(9e9))]
        assert min(neighbours, key=lambda number: abs(Fraction(float(number)) - value)) == result
    assert not torch.equal(reference.fused(a, b, c), (a.double() * b.double() + c.double()).float())


def is_near_the_product(weights: Sequence[QuantizedWeight]) -> None:
    """Each input is at most half a step from what is multiplied, and a step is the block's largest input / 127."""
    for weight in weights:
        inputs = weight.values.shape[-1]
        x = random(9, inputs)
        padded = np.pad(double(x), ((0, 0), (0, -inputs % 32))).reshape(9, -1, 32)
        steps = np.broadcast_to(np.abs(padded).max(-1, keepdims=True) / 127, padded.shape).reshape(9, -1)[:, :inputs]
        wide = double(weight.dequantized())
        error = np.abs(double(expected(x, weight)) - double(x) @ wide.T)
        assert (error <= (steps / 2) @ np.abs(wide).T + 1e-4).all()


def test_the_reference_is_near_the_product() -> None:
    is_near_the_product([weight_of(name, 35, 300) for name in FORMS])
    for format, group_size in GROUPS:
        is_near_the_product([quantized(*shape, format=format, group_size=group_size) for shape in SHAPES])


def test_the_reference_is_exact_for_inputs_that_are_whole_numbers() -> None:
    """Inputs from -127 to 127 with the largest in every block, and scales that are powers of two, lose nothing."""
    for format, group_size in GROUPS:
        weight = quantized(35, 100, format=format, group_size=group_size)
        weight = weight._replace(scales=2.0 ** torch.randint(-6, 1, weight.scales.shape))
        x = torch.randint(-127, 128, (7, 100)).float()
        x[:, ::32] = 127
        assert_same(expected(x, weight), torch.from_numpy(double(x) @ formula(weight).T).float())


@cache
def level_cases(format: str, group_size: int) -> list[tuple[Tensor, QuantizedWeight, Tensor, Tensor]]:
    """Inputs (slices of wider rows), weights, biases and the reference's products, which all levels share."""
    cases: list[tuple[Tensor, QuantizedWeight, Tensor, Tensor]] = []
    for number, (outputs, inputs) in enumerate(SHAPES):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        weight = quantized(outputs, inputs, format=format, group_size=group_size)
        weight.values[-1] = -8 if format == "int4" else -128
        x = random(13, inputs + 3, dtype=dtype, scale=3)[:, :inputs]
        x[3] = x[3].sign() * 3  # the largest sums
        bias = random(outputs, dtype=dtype, seed=2)
        cases.append((x, weight, bias, expected(x, weight, bias)))
    return cases


@pytest.mark.parametrize("native", LEVELS, indirect=True)
@pytest.mark.parametrize(("format", "group_size"), GROUPS)
def test_every_level_equals_the_reference(native: Library, format: str, group_size: int) -> None:
    assert native.level()
    linear = compiled()
    for x, weight, bias, result in level_cases(format, group_size):
        packed = linear.pack(weight)
        assert isinstance(packed, StackedA8)
        assert_same(linear(x, packed, bias), result)


@cache
def stacked_case(name: str) -> tuple[Tensor, StackedWeight, Tensor, Tensor]:
    """x, two matrices of different formats, a bias, and the product by the reference."""
    x, bias = random(7, 300, dtype=torch.bfloat16), random(75, dtype=torch.bfloat16, seed=2)
    stack = StackedWeight((weight_of(name, 35, 300), weight_of("Q4_K", 40, 300)))
    return x, stack, bias, expected(x, stack, bias)


@pytest.mark.parametrize("native", LEVELS, indirect=True)
def test_every_format_equals_the_reference(native: Library) -> None:
    """Also where a product has the outputs of two matrices of different formats, and where rows are embedded with."""
    assert native.level()
    linear, ids = compiled(), torch.tensor([34, 0, 7, 33])
    for name in FORMS:
        x, stack, bias, result = stacked_case(name)
        first, packed = weight_of(name, 35, 300), linear.pack(stack)
        for rows in (1, 2, 7):
            assert_same(linear(x[:rows], packed, bias), result[:rows])
        own = linear.pack(first)
        assert_same(linear(x, own, bias[:35]), result[:, :35])
        assert_same(linear.rows(own, ids, torch.bfloat16), first.dequantized(ids).bfloat16())


@pytest.mark.parametrize("native", LEVELS, indirect=True)
@pytest.mark.parametrize(("format", "group_size"), [("int4", 32), ("int8", ROW)])
def test_special_rows(native: Library, format: str, group_size: int) -> None:
    """An infinity or NaN makes its row NaN. Inputs whose scale would be subnormal count as zeros."""
    assert native.level()
    linear, weight = compiled(), quantized(40, 131, format=format, group_size=group_size)
    x = random(8, 131)
    x[1, 3], x[2, 130], x[3, 70] = torch.inf, torch.nan, -torch.inf
    x[4], x[5] = 0, 1e-37
    x[6, :32] = 1e-40
    out = linear(x, linear.pack(weight))
    assert out.isnan().all(dim=1).tolist() == [False, True, True, True, False, False, False, False]
    assert not out[4:6].any()
    assert_same(out, expected(x, weight))
    x[6, :32] = 0
    assert_same(out[6], expected(x, weight)[6])


@pytest.mark.parametrize("native", LEVELS, indirect=True)
@pytest.mark.parametrize(("format", "group_size"), [("int4", 16), ("int4", 128), ("int8", ROW)])
def test_a_row_has_the_same_bits_among_any_number(native: Library, format: str, group_size: int) -> None:
    """The weight has several panels and more inputs than a tile computes at a time."""
    linear, weight = compiled(), quantized(70, 1500, format=format, group_size=group_size)
    run = partial(linear, weight=linear.pack(weight))
    x = random(max(ROWS), 1500, dtype=torch.bfloat16)
    together = run(x)
    for rows in ROWS:
        native.set_threads(1 + rows % 2)
        for start in {0, 7 % (max(ROWS) - rows + 1), max(ROWS) - rows}:
            assert_same(run(x[start : start + rows]), together[start : start + rows])


@pytest.mark.parametrize("native", LEVELS, indirect=True)
@pytest.mark.parametrize(("up", "back"), [("Q4_0", "Q4_0"), ("Q4_K", "Q6_K"), ("GPTQ, whole rows", "IQ4_NL")])
def test_experts_are_made_of_the_other_ops(native: Library, up: str, back: str) -> None:
    """One expert with weight 1 does what `linear` and `silu_and_mul` do one after the other, and a token gets the same
    bits among any others."""
    linear, run_experts, silu_and_mul = compiled(), RunExperts(PlainExperts()), SiluAndMul()
    _, _, weights, ids = experts_case("int4", 32)
    gate_up, down = weight_of(up, EXPERTS, 2 * INNER, HIDDEN), weight_of(back, EXPERTS, HIDDEN, INNER)
    first, second = (weight.each(lambda tensor: tensor[0]) for weight in (gate_up, down))
    x, packed = random(len(ids), gate_up.values.shape[-1], dtype=torch.bfloat16), run_experts.pack(gate_up, down)
    once, zeros = torch.ones(len(ids), 1), torch.zeros(len(ids), 1, dtype=torch.int32)
    out = run_experts(x, packed, once, zeros)
    assert_same(out, linear(silu_and_mul(linear(x, linear.pack(first))), linear.pack(second)))
    together = run_experts(x, packed, weights, ids)
    for rows in (1, 3, 12, 64):
        native.set_threads(1 + rows % 2)
        for start in {0, 3, len(ids) - rows}:
            part = slice(start, start + rows)
            assert_same(run_experts(x[part], packed, weights[part], ids[part]), together[part])


def test_the_reference_runs_experts_like_the_compiled_code(native: Library) -> None:
    gate_up, down, weights, ids = experts_case("int4", 32)
    x = random(len(ids), gate_up.values.shape[-1], dtype=torch.bfloat16, scale=0.3)
    ours, theirs = RunExperts(PlainExperts()), reference.RunExperts(PlainReferenceExperts())
    out = ours(x, ours.pack(gate_up, down), weights, ids)
    # The two activation functions may differ in the last bit of bfloat16, and so may the inputs of `down`.
    assert_close(out, double(theirs(x, theirs.pack(gate_up, down), weights, ids)), roundings=2, atol=0.1)


@pytest.mark.parametrize("native", LEVELS[:1], indirect=True)
def test_other_weights_go_to_the_other_implementation(native: Library) -> None:
    assert native.level()
    weights = [quantized(4, 64, format="fp8", group_size=ROW), quantized(4, 64, format="int4", group_size=8)]
    x, linear, plain = random(3, 64), compiled(), PlainLinear()
    for weight in (random(4, 64), *weights):
        assert_same(linear(x, linear.pack(weight)), plain(x, plain.pack(weight)))
    kinds = frozenset({Kind(4, is_fine=True), Kind(8, is_fine=True)})
    chosen, coarse = Linear(plain, kinds), quantized(4, 64, format="int8", group_size=ROW)
    four_bits, eight_bits = (quantized(4, 64, format=name, group_size=32) for name in ("int4", "int8"))
    assert not isinstance(chosen.pack(coarse), StackedA8)
    assert not isinstance(chosen.pack(quantized(4, 64, format="int4", group_size=64)), StackedA8)
    assert isinstance(chosen.pack(four_bits), StackedA8)
    assert isinstance(chosen.pack(eight_bits), StackedA8)
    assert isinstance(chosen.pack(StackedWeight((coarse, four_bits))), StackedA8)


@pytest.mark.parametrize("native", LEVELS[:1], indirect=True)
def test_products_use_the_level_of_the_other_implementation(native: Library) -> None:
    """The library stays at its own level. All levels have the same bits, so that only the choice can be compared."""
    for level in LEVELS[: LEVELS.index(native.level()) + 1]:
        packed = Linear(PlainLinear(level)).pack(quantized(4, 64, format="int4", group_size=32))
        assert packed.parts[0].form.level == native.number(level)
        assert units_of(level) in UNITS
    assert units_of(LEVELS[0]) == LEVELS[0]


@pytest.mark.parametrize("native", LEVELS[:1], indirect=True)
def test_bad_arguments_are_refused(native: Library) -> None:
    assert native.level()
    linear, run_experts = compiled(), RunExperts(PlainExperts())
    packed = linear.pack(quantized(4, 64, format="int4", group_size=32))
    with pytest.raises(ValueError, match="x must be float32"):
        linear(random(3, 65), packed)
    with pytest.raises(ValueError, match="bias must be"):
        linear(random(3, 64), packed, random(5))
    gate_up = quantized(2, 8, 32, format="int4", group_size=32)
    with pytest.raises(ValueError, match=r"gate_up must be \[E, 2F, H\] and down \[E, H, F\]"):
        run_experts.pack(gate_up, quantized(2, 32, 5, format="int4", group_size=32))
