from __future__ import annotations

import pytest
import torch

from jamba_server.kernels.ops import Linear
from tests.kernels.cases import DTYPES, assert_close, double, each_implementation, random


@each_implementation("linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (1, 35, 19), (2, 64, 160), (17, 5, 33)])
def test_equals_the_formula(
    linear: Linear, rows: int, outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    x = random(rows, inputs + 3, dtype=dtype)[:, :inputs]  # a slice of a wider row
    weight = random(inputs, outputs, dtype=dtype, seed=1).t()  # not contiguous
    bias = random(outputs, dtype=dtype, seed=2) if with_bias else None
    out = linear(x, linear.pack(weight), bias)
    assert out.dtype == dtype
    expected = double(x) @ double(weight).T + (0 if bias is None else double(bias))
    assert_close(out, expected, roundings=2, atol=1e-5 if dtype == torch.float32 else 1e-1)


@each_implementation("linear")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (35, 19), (100, 64)])
def test_rows_of_a_packed_weight_are_those_of_the_weight(
    linear: Linear, rows: int, inputs: int, dtype: torch.dtype
) -> None:
    weight = random(rows, inputs, dtype=dtype)
    ids = torch.arange(3 * rows).mul_(7).remainder_(rows)
    assert torch.equal(linear.rows(linear.pack(weight), ids), weight[ids])
    assert linear.rows(linear.pack(weight), ids[:0]).shape == (0, inputs)
