from __future__ import annotations

import pytest
import torch

from jamba_server.kernels.ops import CausalConv1d, CausalConv1dUpdate
from tests.kernels import oracle
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    assert_same,
    double,
    each_implementation,
    layer_storage,
    random,
    segments,
)

LENGTHS, SLOTS = (1, 7, 2, 3, 1), (4, 1, 6, 3, 2)
HAS_STATE = (True, False, True, False, False)


@each_implementation("causal_conv1d")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [5, 35])
def test_prefill_equals_the_formula(
    causal_conv1d: CausalConv1d, channels: int, width: int, with_bias: bool, dtype: torch.dtype
) -> None:
    x = random(sum(LENGTHS), channels, dtype=dtype)
    weight = random(width, channels, dtype=dtype, seed=1)
    bias = random(channels, dtype=dtype, seed=2) if with_bias else None
    state = layer_storage(8, width - 1, channels, dtype=dtype)
    expected_state = state.clone()
    for slot, known in zip(SLOTS, HAS_STATE, strict=True):
        if known:
            state[slot] = random(width - 1, channels, dtype=dtype, seed=slot)
    before = state.clone()
    out = causal_conv1d(x, weight, bias, state, segments(LENGTHS, SLOTS, HAS_STATE))
    assert out.dtype == dtype
    start = 0
    for length, slot, known in zip(LENGTHS, SLOTS, HAS_STATE, strict=True):
        history = double(before[slot] if known else torch.zeros_like(before[slot]))
        own, end = double(x[start : start + length]), start + length
        expected, history = oracle.causal_conv1d(own, double(weight), None if bias is None else double(bias), history)
        assert_close(out[start:end], expected)
        expected_state[slot] = torch.from_numpy(history).to(dtype)  # inputs only: no rounding
        start = end
    assert_same(state, expected_state)


@each_implementation("causal_conv1d_update")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_update_equals_the_formula(causal_conv1d_update: CausalConv1dUpdate, width: int, dtype: torch.dtype) -> None:
    x, weight = random(3, 35, dtype=dtype), random(width, 35, dtype=dtype, seed=1)
    bias = random(35, dtype=dtype, seed=2)
    state = layer_storage(6, width - 1, 35, dtype=dtype)
    slots = (5, 1, 2)
    expected_state = state.clone()
    for slot in slots:
        state[slot] = random(width - 1, 35, dtype=dtype, seed=slot)
    before = state.clone()
    out = causal_conv1d_update(x, weight, bias, state, torch.tensor(slots, dtype=torch.int32))
    for i, slot in enumerate(slots):
        expected, history = oracle.causal_conv1d(
            double(x[i : i + 1]), double(weight), double(bias), double(before[slot])
        )
        assert_close(out[i : i + 1], expected)
        expected_state[slot] = torch.from_numpy(history).to(dtype)
    assert_same(state, expected_state)
