"""The emulation of the processor extension AMX, which runs on every machine, and the extension itself where there is
one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.attention import AttentionDecode, AttentionPrefill
from jamba_server.kernels.cpu.library import EMULATED, Library, library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.kernels.table import KernelError, select
from tests.kernels import test_attention
from tests.kernels.cases import LEVELS, assert_same, random

SMALLEST = 2.0**-126  # the smallest float32 that is not subnormal


@pytest.fixture(autouse=True)
def _compiled() -> None:  # pyright: ignore[reportUnusedFunction]
    try:
        library()
    except KernelUnavailable as error:
        pytest.skip(str(error))


def flush(x: float) -> float:
    return 0.0 if abs(x) < SMALLEST else x


def rounded(exact: Fraction) -> float:
    """Rounds a fraction to the nearest float32, by way of a double, which differs in at most one of 2^29 cases."""
    return flush(float(np.float32(float(exact))))


def instruction(x: list[float], weights: list[float]) -> float:
    """TDPBF16PS over the steps of one row and one column, with exact fractions and one rounding for each product."""
    total = 0.0
    for start in range(0, len(x), 32):
        sums = [0.0, 0.0]
        for k in range(start, min(start + 32, len(x))):
            product = Fraction(flush(x[k])) * Fraction(flush(weights[k]))
            sums[k % 2] = rounded(Fraction(sums[k % 2]) + product)
        total = rounded(Fraction(total) + Fraction(rounded(Fraction(sums[0]) + Fraction(sums[1]))))
    return total


@pytest.mark.parametrize(("inputs", "scale"), [(1, 1.0), (32, 1.0), (77, 1.0), (128, 3e-20)])
def test_the_emulation_does_what_the_instruction_is_documented_to_do(inputs: int, scale: float) -> None:
    """With the scale 3e-20, some products are subnormal."""
    linear = Linear(level=EMULATED)
    x = random(3, inputs, dtype=torch.bfloat16, scale=scale)
    weight = random(5, inputs, dtype=torch.bfloat16, seed=1, scale=scale)
    y = linear(x, linear.pack(weight))
    expected = [[instruction(row, column) for column in weight.tolist()] for row in x.tolist()]
    assert_same(y, torch.tensor(expected).to(torch.bfloat16))


def of_subnormal_numbers(linear: Any) -> list[float]:
    x = torch.tensor([[2.0**-130, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[2.0**120, 0.0], [0.0, 2.0**-130], [2.0**120, 1.0]], dtype=torch.bfloat16)
    return linear(x, linear.pack(weight))[0].tolist()


def test_subnormal_numbers_count_as_zero() -> None:
    assert of_subnormal_numbers(Linear(level=EMULATED)) == [0.0, 0.0, 1.0]
    assert of_subnormal_numbers(Linear(level="portable")) == [2.0**-10, 2.0**-130, 1.0]


def cases() -> list[tuple[Tensor, Tensor]]:
    shapes = [(1, 33, 70), (40, 70, 64), (33, 5, 31)]
    return [
        (random(rows, k, dtype=torch.bfloat16), random(n, k, dtype=torch.bfloat16, seed=1)) for rows, n, k in shapes
    ]


@pytest.mark.parametrize("native", LEVELS, indirect=True)
def test_the_emulation_has_the_same_bits_with_every_instruction_set(native: Library) -> None:
    linear = Linear(level=EMULATED)
    found = [linear(x, linear.pack(weight)) for x, weight in cases()]
    native.set_level(LEVELS[0])
    for y, (x, weight) in zip(found, cases(), strict=True):
        assert_same(y, linear(x, linear.pack(weight)))


def test_the_extension_has_the_bits_of_its_emulation() -> None:
    try:
        linear = Linear(level="amx")
    except KernelUnavailable as error:
        pytest.skip(str(error))
    emulation = Linear(level=EMULATED)
    for x, weight in cases():
        assert_same(linear(x, linear.pack(weight)), emulation(x, emulation.pack(weight)))


def attended(level: str) -> list[Tensor]:
    """Attention of 90 tokens after 600 others, with heads of 40 elements, and that of the last token alone."""
    k, v = test_attention.keys_and_values(690, 2, 40, torch.bfloat16)
    q = random(90, 6, 40, dtype=torch.bfloat16, seed=9)
    pages = test_attention.paged([(k, v)], 16)
    prefill, decode = AttentionPrefill(level), AttentionDecode(level)
    return [prefill(q, pages, test_attention.query_start([90]), 90, 0.3), decode(q[-1:], pages, 0.3)]


def test_attention_has_the_bits_of_the_emulation() -> None:
    """The emulation's vectors must be as wide as those of AVX-512, because softmax weights are added lane by lane."""
    try:
        found = attended("amx")
    except KernelUnavailable as error:
        pytest.skip(str(error))
    for actual, expected in zip(found, attended(EMULATED), strict=True):
        assert_same(actual, expected)
    assert_same(found[0][-1:], found[1])


def test_a_level_is_forced_for_attention() -> None:
    kernels = select("cpu", {"linear": f"cpu:{EMULATED}"})
    k, v = test_attention.keys_and_values(70, 1, 32, torch.bfloat16)
    q, pages = random(1, 4, 32, dtype=torch.bfloat16, seed=9), test_attention.paged([(k, v)], 16)
    emulated, portable = (AttentionDecode(level)(q, pages, 0.3) for level in (EMULATED, LEVELS[0]))
    assert_same(kernels.attention_decode(q, pages, 0.3), emulated)
    assert not torch.equal(emulated, portable)


def test_a_level_is_forced_for_linear_and_experts_together() -> None:
    kernels = select("cpu", {"linear": f"cpu:{EMULATED}"})
    x, weight = random(5, 96, dtype=torch.bfloat16), random(40, 96, dtype=torch.bfloat16, seed=1)
    forced = kernels.linear
    assert of_subnormal_numbers(forced) == [0.0, 0.0, 1.0]
    assert_same(forced(x, forced.pack(weight)), Linear()(x, Linear(level=EMULATED).pack(weight)))
    gate_up, down = random(1, 64, 96, dtype=torch.bfloat16, seed=2), random(1, 96, 32, dtype=torch.bfloat16, seed=3)
    experts = kernels.run_experts.pack(gate_up, down)
    out = kernels.run_experts(x, experts, torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32))
    expected = forced(kernels.silu_and_mul(forced(x, forced.pack(gate_up[0]))), forced.pack(down[0]))
    assert_same(out, expected)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"linear": "cpu:fastest"}, "there is no level 'fastest'; there are portable, .*amx-emulated"),
        ({"run_experts": "cpu:avx2"}, "only linear=cpu:LEVEL may"),
        ({"linear": "reference:avx2"}, "only linear=cpu:LEVEL may"),
    ],
)
def test_a_level_that_cannot_be_forced_is_an_error(wish: dict[str, str], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        select("cpu", wish)


def test_forcing_a_level_that_the_machine_lacks_is_an_error() -> None:
    lacking = [level for level in LEVELS if LEVELS.index(level) > LEVELS.index(library().level())]
    if not lacking:
        pytest.skip("this machine has every level")
    for level in lacking:
        with pytest.raises(KernelError, match=f"this machine has no {level}"):
            select("cpu", {"linear": f"cpu:{level}"})
