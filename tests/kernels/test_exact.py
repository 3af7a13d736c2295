from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.reference.exact import ordered_sum, silu, softplus
from tests.kernels.cases import assert_close, assert_same, double, random
from tests.kernels.oracle import silu as silu_oracle


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 160, 257])
def test_ordered_sum_is_the_sum(size: int) -> None:
    x = random(3, size, 5)
    assert_close(ordered_sum(x, 1), double(x).sum(1, keepdims=True))


@pytest.mark.parametrize("size", [1, 7, 16, 160])
def test_ordered_sum_of_a_row_has_the_same_bits_in_every_layout(size: int) -> None:
    x = random(33, size)
    along_rows = ordered_sum(x, -1)
    assert_same(ordered_sum(x.t().contiguous(), 0).t(), along_rows)
    assert_same(torch.cat([ordered_sum(row[None], -1) for row in x]), along_rows)


@pytest.mark.parametrize("function", [silu, softplus])
def test_a_function_gives_the_same_bits_wherever_an_element_stands(function: Callable[[Tensor], Tensor]) -> None:
    x = random(70, scale=8)
    whole = function(x)
    for start in range(35):
        for end in range(start + 1, 70):
            assert_same(function(x[start:end]), whole[start:end])


def test_silu_and_softplus_are_right_at_both_ends() -> None:
    x = torch.tensor([-120.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 19.99, 20.0, 20.01, 90.0, 120.0])
    with np.errstate(over="ignore"):
        assert_close(silu(x), silu_oracle(double(x)))
    assert_close(softplus(x), np.logaddexp(0, double(x)), atol=1e-8)
