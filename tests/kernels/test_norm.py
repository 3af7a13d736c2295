from __future__ import annotations

import pytest
import torch

from jamba_server.kernels.ops import RmsNorm
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, EXACT_DTYPES, assert_close, assert_same, double, each_implementation, random

EPS = 1e-6
SIZES = [1, 7, 64, 161]


@each_implementation("rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_formula(rms_norm: RmsNorm, size: int, dtype: torch.dtype) -> None:
    x, weight = random(5, size, dtype=dtype, scale=3), random(size, dtype=dtype, seed=1)
    normed, total = rms_norm(x, weight, EPS)
    assert_close(normed, oracle.rms_norm(double(x), double(weight), EPS), roundings=2)
    assert_same(total, x)


@each_implementation("rms_norm")
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_and_rounded_first(rms_norm: RmsNorm, dtype: torch.dtype) -> None:
    x, residual = random(5, 33, dtype=dtype, scale=3), random(5, 33, dtype=dtype, seed=1)
    weight = random(33, dtype=dtype, seed=2)
    normed, total = rms_norm(x, weight, EPS, residual)
    assert_same(total, torch.from_numpy(double(x) + double(residual)).to(dtype))
    assert_close(normed, oracle.rms_norm(double(total), double(weight), EPS), roundings=2)


@each_implementation("rms_norm")
def test_rounds_before_the_weight_multiplies(rms_norm: RmsNorm) -> None:
    x = torch.arange(-100, 101, dtype=torch.bfloat16)[None]  # squares whose sum is exact in any order
    weight = random(201, dtype=torch.bfloat16)
    unweighted = torch.from_numpy(oracle.rms_norm(double(x), double(torch.ones(201)), EPS)).bfloat16()
    rounded_twice = (unweighted.double() * weight.double()).bfloat16()
    rounded_once = torch.from_numpy(oracle.rms_norm(double(x), double(weight), EPS)).bfloat16()
    assert not torch.equal(rounded_once, rounded_twice)
    assert_same(rms_norm(x, weight, EPS)[0], rounded_twice)


@each_implementation("rms_norm")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(rms_norm: RmsNorm, size: int, dtype: torch.dtype) -> None:
    x, residual = random(9, size, dtype=dtype), random(9, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    together = rms_norm(x, weight, EPS, residual)
    for t in range(9):
        alone = rms_norm(x[t : t + 1], weight, EPS, residual[t : t + 1])
        assert_same(alone[0], together[0][t : t + 1])
        assert_same(alone[1], together[1][t : t + 1])
    # B and C are slices of a wider row
    wide = torch.cat([x, residual], dim=1)
    assert_same(rms_norm(wide[:, :size], weight, EPS)[0], rms_norm(x, weight, EPS)[0])
