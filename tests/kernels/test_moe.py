from __future__ import annotations

import numpy as np
import pytest
import torch

from jamba_server.kernels.ops import RouteExperts, RunExperts, SiluAndMul
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, EXACT_DTYPES, assert_close, assert_same, double, each_implementation, random


@each_implementation("route_experts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (16, 2), (7, 7)])
def test_route_equals_the_formula(route_experts: RouteExperts, experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits = random(9, experts, dtype=dtype, scale=3)
    weights, ids = route_experts(logits, top_k)
    expected_weights, expected_ids = oracle.route_experts(double(logits), top_k)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert_close(weights, expected_weights, atol=1e-7)
    assert ids.tolist() == expected_ids.tolist()


@each_implementation("route_experts")
def test_ties_go_to_the_lower_index(route_experts: RouteExperts) -> None:
    logits = torch.zeros(3, 40)
    logits[1, [5, 9, 39]] = 2.0
    logits[2, [8, 17]] = -1.0
    _, ids = route_experts(logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 9, 39, 0], [0, 1, 2, 3]]


@each_implementation("route_experts")
def test_weights_are_not_renormalised(route_experts: RouteExperts) -> None:
    weights, _ = route_experts(torch.zeros(2, 16), 2)
    assert_same(weights, torch.full((2, 2), 1 / 16))


@each_implementation("route_experts")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_a_route_alone_has_the_bits_it_has_in_a_batch(route_experts: RouteExperts, dtype: torch.dtype) -> None:
    logits = random(40, 7, dtype=dtype)
    together = route_experts(logits, 2)
    for t in range(40):
        alone = route_experts(logits[t : t + 1], 2)
        assert_same(alone[0], together[0][t : t + 1])
        assert_same(alone[1], together[1][t : t + 1])


@each_implementation("run_experts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (1, 6, 2), (23, 6, 2), (5, 40, 3)])
def test_run_equals_the_formula(
    run_experts: RunExperts, tokens: int, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    hidden, intermediate = 13, 10
    x = random(tokens, hidden, dtype=dtype)
    gate_up = random(experts, 2 * intermediate, hidden, dtype=dtype, seed=1, scale=0.5)
    down = random(experts, hidden, intermediate, dtype=dtype, seed=2, scale=0.5)
    ids = torch.stack([(torch.arange(top_k) * 5 + 3 * t) % experts for t in range(tokens)]).int()
    weights = torch.softmax(random(tokens, top_k, seed=3), dim=-1)
    out = run_experts(x, run_experts.pack(gate_up, down), weights, ids)
    assert out.dtype == dtype
    expected = oracle.run_experts(
        double(x), double(gate_up), double(down), double(weights), ids.numpy().astype(np.int64)
    )
    # gate, up, silu, their product, the weight, the weighted output and the sum are rounded; terms may cancel
    slack = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert_close(out, expected, roundings=7, atol=slack)


@each_implementation("run_experts")
def test_an_expert_with_a_weight_of_zero_adds_nothing(run_experts: RunExperts) -> None:
    x, gate_up, down = random(4, 8), random(3, 12, 8, seed=1), random(3, 8, 6, seed=2)
    packed = run_experts.pack(gate_up, down)
    ids = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert_close(run_experts(x, packed, weights, ids), double(run_experts(x, packed, weights[:, :1], ids[:, :1])))


@each_implementation("silu_and_mul")
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_equals_the_formula(silu_and_mul: SiluAndMul, dtype: torch.dtype) -> None:
    wide = random(5, 40, dtype=dtype, scale=4)
    gate_up = wide[:, 3:37]  # rows may be strided
    gate, up = double(gate_up)[:, :17], double(gate_up)[:, 17:]
    assert_close(silu_and_mul(gate_up), oracle.silu(gate) * up, roundings=2)


@each_implementation("silu_and_mul")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_silu_and_mul_of_a_row_alone_has_the_bits_it_has_in_a_batch(
    silu_and_mul: SiluAndMul, dtype: torch.dtype
) -> None:
    gate_up = random(33, 26, dtype=dtype, scale=4)
    together = silu_and_mul(gate_up)
    for t in range(33):
        assert_same(silu_and_mul(gate_up[t : t + 1]), together[t : t + 1])
