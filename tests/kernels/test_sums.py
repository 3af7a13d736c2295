"""Products and experts that are sections: their results in float32, before they are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.cpu.linear import Linear as CpuLinear
from jamba_server.kernels.cpu.moe import RunExperts as CpuExperts
from jamba_server.kernels.ops import Linear, QuantizedWeight, RunExperts, SiluAndMul
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, assert_close, assert_same, double, each_implementation, random
from tests.kernels.test_quantized import FORMATS, quantized

SHAPES = [(1, 33, 40), (5, 64, 96), (70, 45, 130)]  # rows, inputs, outputs


def sums_of(linear: Linear, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    rows = len(weight) if isinstance(weight, Tensor) else len(weight.values)
    out = torch.full((len(x), rows), torch.nan, device=x.device)
    linear.sums(x, linear.pack(weight), out)
    return out


@each_implementation("linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_product_is_a_rounded_sum(linear: Linear, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = (
        random(rows, 2 * inputs, dtype=dtype)[:, inputs // 2 : inputs // 2 + inputs],
        random(outputs, inputs, dtype=dtype, seed=1),
    )
    sums = sums_of(linear, x, weight)
    assert_close(sums, double(x) @ double(weight).T, atol=1e-4)
    if type(linear).__module__.endswith("reference.linear"):
        assert_close(sums.to(dtype), double(linear(x, linear.pack(weight))), atol=0.1)
    else:
        assert_same(sums.to(dtype), linear(x, linear.pack(weight)))


@each_implementation("linear")
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_quantised_products_are_rounded_sums(linear: Linear, format: str, group_size: int) -> None:
    x, weight = random(5, 512, dtype=torch.bfloat16), quantized(40, 512, format=format, group_size=group_size)
    assert_same(sums_of(linear, x, weight).bfloat16(), linear(x, linear.pack(weight)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_has_sums(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    for rows, inputs, outputs in SHAPES:
        x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
        linear = CpuLinear()
        assert_same(sums_of(linear, x, weight).to(dtype), linear(x, linear.pack(weight)))
    experts_are_weighted_sums(CpuExperts(), dtype)


@each_implementation("run_experts")
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(run_experts: RunExperts, dtype: torch.dtype) -> None:
    experts_are_weighted_sums(run_experts, dtype)


def experts_are_weighted_sums(run_experts: RunExperts, dtype: torch.dtype) -> None:
    """Against the formula; and the weights of a token's experts are rounded to the model's dtype."""
    tokens, experts, top_k, hidden, inner = 23, 6, 2, 40, 36
    x = random(tokens, hidden, dtype=dtype)
    gate_up = random(experts, 2 * inner, hidden, dtype=dtype, seed=1, scale=0.3)
    down = random(experts, hidden, inner, dtype=dtype, seed=2, scale=0.3)
    ids = torch.stack([(torch.arange(top_k) * 5 + 3 * t) % experts for t in range(tokens)]).int().to(x.device)
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(3)).to(x.device)
    packed = run_experts.pack(gate_up, down)
    out = torch.full((tokens, hidden), torch.nan, device=x.device)
    run_experts.sums(x, packed, weights, ids, out)
    expected = oracle.run_experts(
        double(x), double(gate_up), double(down), double(weights.to(dtype)), ids.cpu().numpy()
    )
    assert_close(out, expected, atol=1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        assert_same(out, run_experts(x, packed, weights, ids))
    else:
        rounded = double(run_experts(x, packed, weights, ids))
        assert abs(double(out) - expected).mean() < abs(rounded - expected).mean(), "it is rounded less often"


@each_implementation("linear", "silu_and_mul", "run_experts", but="reference")
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_one_choice_are_products(
    linear: Linear, silu_and_mul: SiluAndMul, run_experts: RunExperts, dtype: torch.dtype
) -> None:
    x = random(7, 64, dtype=dtype)
    gate_up, down = random(1, 96, 64, dtype=dtype, seed=1), random(1, 64, 48, dtype=dtype, seed=2)
    ids, weights = torch.zeros(7, 1, dtype=torch.int32, device=x.device), torch.full((7, 1), 0.5, device=x.device)
    out = torch.empty(7, 64, device=x.device)
    run_experts.sums(x, run_experts.pack(gate_up, down), weights, ids, out)
    hidden = silu_and_mul(linear(x, linear.pack(gate_up[0])))
    assert_close(out, double(0.5 * sums_of(linear, hidden, down[0])), atol=2e-3)
