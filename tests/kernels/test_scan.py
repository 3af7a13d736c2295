from __future__ import annotations

import pytest
import torch

from jamba_server.kernels.ops import ScanInputs, ScanWeights, SelectiveScan, SelectiveStateUpdate
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


def make_inputs(tokens: int, channels: int, states: int, dtype: torch.dtype) -> ScanInputs:
    u, z = (random(tokens, channels, dtype=dtype, seed=seed) for seed in (0, 1))
    dt = random(tokens, channels, dtype=dtype, seed=2, scale=4)
    dt[0, 0], dt[-1, -1] = 30, -100  # softplus at both ends
    # b and c are neighbours in one row, as the projection that makes them leaves them
    b, c = random(tokens, 2 * states, dtype=dtype, seed=3).split(states, dim=1)
    return ScanInputs(u, dt, b, c, z)


def make_weights(channels: int, states: int) -> ScanWeights:
    a = -torch.exp(random(channels, states, seed=4))
    return ScanWeights(a=a, d=random(channels, seed=5), dt_bias=random(channels, seed=6) - 1)


def run_oracle(
    inputs: ScanInputs, weights: ScanWeights, rows: slice, state: torch.Tensor
) -> tuple[oracle.Array, oracle.Array]:
    own = oracle.Scan(*(double(tensor[rows]) for tensor in inputs))
    return oracle.selective_scan(own, double(weights.a), double(weights.d), double(weights.dt_bias), double(state))


@each_implementation("selective_scan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 8, 16])
@pytest.mark.parametrize(
    ("lengths", "channels"),
    [((1, 9, 2, 3, 1), 3), ((2, 70, 1), 2), ((4, *(1 for _ in range(40))), 2)],
    ids=["mixed", "long", "many"],
)
def test_prefill_equals_the_formula(
    selective_scan: SelectiveScan, lengths: tuple[int, ...], channels: int, states: int, dtype: torch.dtype
) -> None:
    inputs, weights = make_inputs(sum(lengths), channels, states, dtype), make_weights(channels, states)
    slots = [(5 * i + 3) % 47 for i in range(len(lengths))]
    has_state = [i % 2 == 0 for i in range(len(lengths))]
    state = layer_storage(47, channels, states, dtype=torch.float32)
    for slot, known in zip(slots, has_state, strict=True):
        if known:
            state[slot] = random(channels, states, seed=slot)
    before = state.clone()
    out = selective_scan(inputs, weights, state, segments(lengths, slots, has_state))
    assert out.dtype == dtype
    start = 0
    for length, slot, known in zip(lengths, slots, has_state, strict=True):
        end = start + length
        initial = before[slot] if known else torch.zeros_like(before[slot])
        expected, final = run_oracle(inputs, weights, slice(start, end), initial)
        assert_close(out[start:end], expected)
        assert_close(state[slot], final)
        start = end
    others = [slot for slot in range(47) if slot not in slots]
    assert_same(state[others], before[others])


@each_implementation("selective_state_update")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 8, 16])
def test_update_equals_the_formula(
    selective_state_update: SelectiveStateUpdate, states: int, dtype: torch.dtype
) -> None:
    inputs, weights = make_inputs(3, 19, states, dtype), make_weights(19, states)
    state = layer_storage(6, 19, states, dtype=torch.float32)
    slots = (5, 1, 2)
    for slot in slots:
        state[slot] = random(19, states, seed=slot)
    before = state.clone()
    out = selective_state_update(inputs, weights, state, torch.tensor(slots, dtype=torch.int32))
    assert out.dtype == dtype
    for i, slot in enumerate(slots):
        expected, final = run_oracle(inputs, weights, slice(i, i + 1), before[slot])
        assert_close(out[i : i + 1], expected)
        assert_close(state[slot], final)
    assert_same(state[[0, 3, 4]], before[[0, 3, 4]])
