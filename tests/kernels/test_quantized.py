"""Products with quantised weights: every implementation against the formula, the compiled one to the bit."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.cpu.linear import Linear as CpuLinear
from jamba_server.kernels.cpu.moe import RunExperts as CpuRunExperts
from jamba_server.kernels.cpu.moe import SiluAndMul
from jamba_server.kernels.ops import Linear, QuantizedWeight, RunExperts
from tests.kernels import oracle
from tests.kernels.cases import ALL_LEVELS, DTYPES, assert_close, assert_same, double, each_implementation, random
from tests.kernels.oracle import Array
from tests.nightly import each_pair

HIGHEST = {"int8": 127, "int4": 7, "fp8": 448}
ROW = 1 << 20
FORMATS = [("int8", ROW), ("int4", 128), ("fp8", ROW)]  # and group size
OTHERS = [("int8", 128), ("int4", 8), ("int4", ROW), ("fp8", 128)]  # what the compiled kernels can do beside
SHAPES = [(1, 1), (5, 33), (35, 129), (64, 160), (300, 77), (70, 261)]
ROWS = (*range(1, 71), 201, 530)


def quantized(*shape: int, format: str, group_size: int, seed: int = 0) -> QuantizedWeight:
    """Weights [..., N, K] within -2..2; both the highest and the lowest number occur, of fp8 every one that is finite
    if there is room."""
    generator, highest = torch.Generator().manual_seed(seed), HIGHEST[format]
    if format == "fp8":
        finite = torch.tensor([bits for bits in range(256) if bits & 0x7F != 0x7F], dtype=torch.uint8)
        places = torch.arange(math.prod(shape))[torch.randperm(math.prod(shape), generator=generator)]
        values = finite[places % len(finite)].view(torch.float8_e4m3fn).view(shape)
    else:
        values = torch.randint(-highest, highest + 1, shape, generator=generator).to(torch.int8)
    values[..., 0, 0], values[..., -1, -1] = highest, -highest
    scales = torch.rand(*shape[:-1], -(-shape[-1] // group_size), generator=generator) * 2 / highest
    return QuantizedWeight(values, scales, group_size, 4 if format == "int4" else 8)


def formula(weight: QuantizedWeight) -> Array:
    scales = double(weight.scales).repeat(min(weight.group_size, weight.values.shape[-1]), axis=-1)
    return double(weight.values) * scales[..., : weight.values.shape[-1]]


@each_implementation("linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear_equals_the_formula(
    linear: Linear, outputs: int, inputs: int, format: str, group_size: int, dtype: torch.dtype
) -> None:
    x = random(9, inputs + 3, dtype=dtype)[:, :inputs]  # a slice of a wider row
    weight = quantized(outputs, inputs, format=format, group_size=group_size)
    bias = random(outputs, dtype=dtype, seed=2)
    for rows in (1, 9):
        out = linear(x[:rows], linear.pack(weight), bias)
        assert out.dtype == dtype
        assert_close(out, double(x[:rows]) @ formula(weight).T + double(bias), atol=1e-4)


TOKENS, EXPERTS, TOP_K, HIDDEN, INNER = 70, 5, 2, 37, 139


def experts_case(format: str, group_size: int) -> tuple[QuantizedWeight, QuantizedWeight, Tensor, Tensor]:
    """gate_up, down, weights, ids; expert 3 is chosen by nobody."""
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=torch.Generator().manual_seed(t)) for t in range(TOKENS)])
    ids[ids == 3] = EXPERTS - 1
    gate_up = quantized(EXPERTS, 2 * INNER, HIDDEN, format=format, group_size=group_size, seed=1)
    down = quantized(EXPERTS, HIDDEN, INNER, format=format, group_size=group_size, seed=2)
    return gate_up, down, torch.softmax(random(TOKENS, TOP_K, seed=3), dim=-1), ids[:, :TOP_K].int()


@each_implementation("run_experts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_experts_equal_the_formula(run_experts: RunExperts, format: str, group_size: int, dtype: torch.dtype) -> None:
    gate_up, down, weights, ids = experts_case(format, group_size)
    x = random(TOKENS, HIDDEN, dtype=dtype, scale=0.3)
    out = run_experts(x, run_experts.pack(gate_up, down), weights, ids)
    expected = oracle.run_experts(
        double(x), formula(gate_up), formula(down), double(weights), ids.numpy().astype(np.int64)
    )
    # rounded on the way: gate, up, silu, their product, the weight, the weighted output; terms cancel
    slack = {torch.float32: 2e-4, torch.bfloat16: 0.4, torch.float16: 0.05}[dtype]
    assert_close(out, expected, roundings=7, atol=slack)


@each_pair({"native": ALL_LEVELS, "format, group_size": FORMATS + OTHERS, "dtype": DTYPES}, indirect=["native"])
def test_whole_numbers_have_exact_products(native: Library, format: str, group_size: int, dtype: torch.dtype) -> None:
    """With small whole x and scales that are powers of two nothing is rounded but the result."""
    assert native.level()
    linear, generator = CpuLinear(), torch.Generator().manual_seed(5)
    for outputs, inputs in SHAPES:
        weight = quantized(outputs, inputs, format=format, group_size=group_size)
        exponents = torch.randint(-6, 1, weight.scales.shape, generator=generator)
        if format == "fp8":  # whose own exponents leave little room in a sum
            exponents[:] = exponents[:, :1]
        weight = weight._replace(scales=2.0**exponents)
        x = torch.randint(-3, 4, (31, inputs), generator=generator).to(dtype)
        expected = torch.from_numpy(double(x) @ formula(weight).T)
        assert_same(linear(x, linear.pack(weight)), expected.to(dtype))


@pytest.mark.parametrize(("format", "group_size"), FORMATS + OTHERS)
def test_packing_keeps_every_number(native: Library, format: str, group_size: int) -> None:
    assert native.level()
    linear = CpuLinear()
    weight = quantized(261, 70, format=format, group_size=group_size)
    strided = weight._replace(values=weight.values.t().contiguous().t(), scales=weight.scales.t().contiguous().t())
    before = weight.values.clone(), weight.scales.clone()
    scales = weight.scales.repeat_interleave(min(group_size, 70), dim=1)[:, :70]
    for source in (weight, strided):
        assert_same(linear(torch.eye(70), linear.pack(source)), (weight.values.float() * scales).t())
    assert torch.equal(weight.values, before[0]) and torch.equal(weight.scales, before[1])


@each_pair({"native": ALL_LEVELS, "format, group_size": FORMATS, "dtype": DTYPES}, indirect=["native"])
def test_a_row_has_the_same_bits_among_any_number(
    native: Library, format: str, group_size: int, dtype: torch.dtype
) -> None:
    outputs, inputs = 167, 261  # the last panel and the last group are not full
    linear, bias = CpuLinear(), random(outputs, dtype=dtype, seed=2)
    packed = linear.pack(quantized(outputs, inputs, format=format, group_size=group_size))
    run = partial(linear, weight=packed, bias=bias)
    x = random(max(ROWS), inputs + 3, dtype=dtype)[:, :inputs]
    together = run(x)
    for rows in ROWS:
        native.set_threads(1 + rows % 2)
        start = (7 * rows) % (max(ROWS) - rows + 1)
        assert_same(run(x[start : start + rows]), together[start : start + rows])


@each_pair({"native": ALL_LEVELS, "format, group_size": FORMATS, "dtype": DTYPES}, indirect=["native"])
def test_a_token_gets_the_same_bits_from_its_experts_among_any_others(
    native: Library, format: str, group_size: int, dtype: torch.dtype
) -> None:
    run_experts = CpuRunExperts()
    gate_up, down, weights, ids = experts_case(format, group_size)
    x = random(TOKENS, HIDDEN + 5, dtype=dtype)[:, :HIDDEN]
    packed = run_experts.pack(gate_up, down)
    together = run_experts(x, packed, weights, ids)
    for rows in (1, 2, 3, 7, 12, 13, 31, 64, 70):
        native.set_threads(1 + rows % 2)
        for start in {0, min(3, TOKENS - rows), TOKENS - rows}:
            part = slice(start, start + rows)
            assert_same(run_experts(x[part], packed, weights[part], ids[part]), together[part])


@each_pair({"native": ALL_LEVELS, "format, group_size": FORMATS, "dtype": DTYPES}, indirect=["native"])
def test_experts_are_made_of_the_other_ops(native: Library, format: str, group_size: int, dtype: torch.dtype) -> None:
    """One expert with weight 1 does what `linear` and `silu_and_mul` do one after the other."""
    assert native.level()
    run_experts, linear, silu_and_mul = CpuRunExperts(), CpuLinear(), SiluAndMul()
    gate_up, down, _, _ = experts_case(format, group_size)
    first, second = (all_._replace(values=all_.values[0], scales=all_.scales[0]) for all_ in (gate_up, down))
    x = random(TOKENS, HIDDEN, dtype=dtype)
    once, zeros = torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1, dtype=torch.int32)
    out = run_experts(x, run_experts.pack(gate_up, down), once, zeros)
    assert_same(out, linear(silu_and_mul(linear(x, linear.pack(first))), linear.pack(second)))


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_infinities_and_nan_stay_in_their_row(native: Library, format: str, group_size: int) -> None:
    assert native.level()
    linear, x = CpuLinear(), random(5, 131, dtype=torch.bfloat16)
    x[2, 3], x[4, 130] = torch.inf, torch.nan
    weight = quantized(40, 131, format=format, group_size=group_size)
    finite = linear(x, linear.pack(weight)).isfinite()
    assert finite.all(dim=1).tolist() == [True, True, False, True, False] and not finite[4].any()


WEIGHT = quantized(4, 64, format="int4", group_size=32)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WEIGHT._replace(bits=3), "4 and 8 bits, not 3"),
        (WEIGHT._replace(group_size=36), "multiple of 8 inputs or of whole rows, not of 36"),
        (WEIGHT._replace(group_size=0), "not of 0"),
        (WEIGHT._replace(group_size=16), r"have float32 or float16 scales \(4, 4\), not torch.float32 \(4, 2\)"),
        (WEIGHT._replace(values=WEIGHT.values.short()), "not torch.int16 of 4"),
        (WEIGHT._replace(values=WEIGHT.values.to(torch.float8_e4m3fn)), "not torch.float8_e4m3fn of 4"),
        (WEIGHT._replace(scales=WEIGHT.scales.double()), "torch.float64"),
    ],
)
def test_a_weight_without_code_for_it_is_refused(native: Library, weight: QuantizedWeight, message: str) -> None:
    assert native.level()
    with pytest.raises(ValueError, match=message):
        CpuLinear().pack(weight)


def test_experts_of_which_one_matrix_is_not_quantised_are_refused(native: Library) -> None:
    assert native.level()
    gate_up, down = quantized(2, 8, 16, format="int8", group_size=16), torch.zeros(2, 16, 4)
    with pytest.raises(ValueError, match=r"gate_up and down differ in dtype: None and torch\.float32"):
        CpuRunExperts().pack(gate_up, down)
