"""The compiled matrix products, single and of experts, at every level that this machine has."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.cpu.moe import RunExperts, SiluAndMul
from tests.kernels import oracle
from tests.kernels.cases import ALL_LEVELS, DTYPES, assert_close, assert_same, double, random
from tests.nightly import each_pair

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 24, 31, 64, 200)
SHAPES = [(1, 1), (5, 33), (35, 19), (64, 160), (300, 77)]


@each_pair({"native": ALL_LEVELS, "outputs, inputs": SHAPES, "dtype": DTYPES}, indirect=["native"])
def test_a_row_has_the_same_bits_among_any_number(
    native: Library, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    assert native.level()
    linear, bias = Linear(), random(outputs, dtype=dtype, seed=2)
    run = partial(linear, weight=linear.pack(random(outputs, inputs, dtype=dtype, seed=1)), bias=bias)
    x = random(max(ROWS), inputs + 3, dtype=dtype)[:, :inputs]  # a slice of a wider row
    together = run(x)
    for rows in ROWS:
        for start in {0, 7, max(ROWS) - rows}:
            assert_same(run(x[start : start + rows]), together[start : start + rows])


@each_pair(
    {"native": ALL_LEVELS, "rows": (1, 3, 12, 31), "outputs, inputs": SHAPES, "dtype": DTYPES}, indirect=["native"]
)
def test_equals_the_formula(native: Library, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    assert native.level()
    linear = Linear()
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    out = linear(x, linear.pack(weight))
    assert_close(out, double(x) @ double(weight).T, atol=1e-4)


@each_pair(
    {
        "native": ALL_LEVELS,
        "rows, outputs, inputs": [(1, 2000, 300), (40, 33, 300), (200, 500, 64)],
        "dtype": DTYPES,
    },
    indirect=["native"],
)
def test_the_number_of_threads_changes_nothing(
    native: Library, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    linear = Linear()
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    packed = linear.pack(weight)
    native.set_threads(1)
    alone = linear(x, packed)
    for threads in (2, 5):
        native.set_threads(threads)
        assert_same(linear(x, packed), alone)
        assert_same(linear(x, linear.pack(weight)), alone)


def test_what_lies_beside_the_rows_is_not_read(native: Library) -> None:
    assert native.level()
    linear = Linear()
    wide = torch.full((9, 50), torch.nan, dtype=torch.bfloat16)
    wide[:, 5:38] = random(9, 33, dtype=torch.bfloat16)
    assert linear(wide[:, 5:38], linear.pack(random(40, 33, dtype=torch.bfloat16, seed=1))).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_leaves_the_weight_as_it_is(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    weight = random(35, 19, dtype=dtype)
    before = weight.clone()
    Linear().pack(weight)
    assert_same(weight, before)


def test_infinities_and_nan_stay_in_their_row_and_column(native: Library) -> None:
    assert native.level()
    linear = Linear()
    x, weight = random(5, 16, dtype=torch.bfloat16), random(40, 16, dtype=torch.bfloat16, seed=1)
    x[2, 3], weight[33, 0] = torch.inf, torch.nan
    finite = linear(x, linear.pack(weight)).isfinite()
    expected = torch.ones(5, 40, dtype=torch.bool)
    expected[2], expected[:, 33] = False, False
    assert_same(finite, expected)


TOKENS, EXPERTS, TOP_K, HIDDEN, INNER = 70, 5, 2, 35, 19


def experts_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (a slice of wider rows), gate_up, down, weights, ids; expert 3 is chosen by nobody."""
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=torch.Generator().manual_seed(t)) for t in range(TOKENS)])
    ids[ids == 3] = EXPERTS - 1
    return (
        random(TOKENS, HIDDEN + 5, dtype=dtype)[:, :HIDDEN],
        random(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype, seed=1),
        random(EXPERTS, HIDDEN, INNER, dtype=dtype, seed=2),
        torch.softmax(random(TOKENS, TOP_K, seed=3), dim=-1),
        ids[:, :TOP_K].int(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_from_its_experts_among_any_others(native: Library, dtype: torch.dtype) -> None:
    run_experts = RunExperts()
    x, gate_up, down, weights, ids = experts_case(dtype)
    packed = run_experts.pack(gate_up, down)
    together = run_experts(x, packed, weights, ids)
    for rows in ROWS[:-1]:
        for start in {0, 3, TOKENS - rows}:
            part = slice(start, start + rows)
            assert_same(run_experts(x[part], packed, weights[part], ids[part]), together[part])
    native.set_threads(1)
    assert_same(run_experts(x, packed, weights, ids), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_equal_the_formula(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    run_experts = RunExperts()
    x, gate_up, down, weights, ids = experts_case(dtype)
    out = run_experts(x, run_experts.pack(gate_up, down), weights, ids)
    expected = oracle.run_experts(
        double(x), double(gate_up), double(down), double(weights), ids.numpy().astype(np.int64)
    )
    # rounded on the way: gate, up, silu, their product, the weight, the weighted output; terms cancel
    slack = {torch.float32: 2e-4, torch.bfloat16: 1.0, torch.float16: 0.15}[dtype]
    assert_close(out, expected, roundings=7, atol=slack)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_made_of_the_other_ops(native: Library, dtype: torch.dtype) -> None:
    """One expert with weight 1 does what `linear` and `silu_and_mul` do one after the other."""
    assert native.level()
    run_experts, linear, silu_and_mul = RunExperts(), Linear(), SiluAndMul()
    x, gate_up, down, _, _ = experts_case(dtype)
    once, zeros = torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1, dtype=torch.int32)
    out = run_experts(x, run_experts.pack(gate_up[:1], down[:1]), once, zeros)
    assert_same(out, linear(silu_and_mul(linear(x, linear.pack(gate_up[0]))), linear.pack(down[0])))


def test_no_tokens_are_no_work(native: Library) -> None:
    assert native.level()
    run_experts, linear = RunExperts(), Linear()
    x, gate_up, down, weights, ids = experts_case(torch.bfloat16)
    assert linear(x[:0], linear.pack(gate_up[0])).shape == (0, 2 * INNER)
    assert run_experts(x[:0], run_experts.pack(gate_up, down), weights[:0], ids[:0]).shape == (0, HIDDEN)
