"""Products with weights in the formats of files: unsigned numbers, tables, half-precision and two-level scales,
offsets, zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.cpu.linear import Linear as CpuLinear
from jamba_server.kernels.cpu.linear import PackedWeight
from jamba_server.kernels.cpu.moe import RunExperts as CpuRunExperts
from jamba_server.kernels.cpu.moe import SiluAndMul
from jamba_server.kernels.ops import SUPER_GROUP, Linear, QuantizedWeight, StackedWeight
from tests.kernels.cases import ALL_LEVELS, assert_same, double, each_implementation, random
from tests.kernels.oracle import Array
from tests.nightly import each_pair

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
NF4 = tuple(float(np.float32(number)) for number in np.tanh(np.linspace(-2, 2, 16)))
# Each format has a name, the dtype of the values, bits, the dtype of scales, whether there are two levels, what is
# added ("offset", "zero" or nothing), a table and the size of a group.
FORMATS = {
    "Q8_0": (torch.int8, 8, torch.float16, False, "", None, 32),
    "Q4_0": (torch.int8, 4, torch.float16, False, "", None, 32),
    "Q4_1": (torch.uint8, 4, torch.float16, False, "offset", None, 32),
    "Q5_0": (torch.int8, 8, torch.float16, False, "", None, 32),
    "Q5_1": (torch.uint8, 8, torch.float16, False, "offset", None, 32),
    "Q2_K": (torch.uint8, 4, torch.uint8, True, "offset", None, 16),
    "Q3_K": (torch.int8, 4, torch.int8, True, "", None, 16),
    "Q4_K": (torch.uint8, 4, torch.uint8, True, "offset", None, 32),
    "Q5_K": (torch.uint8, 8, torch.uint8, True, "offset", None, 32),
    "Q6_K": (torch.int8, 8, torch.int8, True, "", None, 16),
    "IQ4_NL": (torch.uint8, 4, torch.float16, False, "", IQ4, 32),
    "IQ4_XS": (torch.uint8, 4, torch.int8, True, "", IQ4, 32),
    "NF4": (torch.uint8, 4, torch.float32, False, "", NF4, 64),
    "AWQ": (torch.uint8, 4, torch.float16, False, "zero", None, 128),
    "GPTQ, whole rows": (torch.uint8, 4, torch.float16, False, "zero", None, 1 << 20),
    "MLX": (torch.uint8, 8, torch.float32, False, "offset", None, 64),
}
INPUTS = 552  # more than two groups of the second level; the last groups are not full


def factors(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, two_levels: bool) -> Tensor:
    if two_levels:
        low, high = (0, 63) if dtype == torch.uint8 else (-32, 31)
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    numbers = (torch.rand(shape, generator=generator) - 0.5).to(dtype)
    numbers[..., 0, 0] = 0.0
    numbers[..., -1, -1] = 2.0**-24  # a subnormal number in half precision
    return numbers


def weight_of(name: str, *shape: int, seed: int = 0) -> QuantizedWeight:
    """Weights [..., N, K] whose values have the smallest and the largest number of the format."""
    dtype, bits, scale, two_levels, added, table, size = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1)) if dtype == torch.int8 else 0
    values = torch.randint(low, low + (1 << bits), shape, generator=generator).to(dtype)
    values[..., 0, :16] = torch.tensor([low, low + (1 << bits) - 1] * 8)
    groups = (*shape[:-1], -(-shape[-1] // size))
    supers = (*shape[:-1], -(-shape[-1] // SUPER_GROUP))
    return QuantizedWeight(
        values,
        factors(generator, groups, scale, two_levels),
        size,
        bits,
        offsets=factors(generator, groups, scale, two_levels) if added == "offset" else None,
        zeros=torch.randint(0, 17, groups, generator=generator).to(torch.uint8) if added == "zero" else None,
        super_scales=factors(generator, supers, torch.float16, False) if two_levels else None,
        super_offsets=factors(generator, supers, torch.float16, False) if two_levels and added else None,
        table=table,
    )


def parts_of(weight: QuantizedWeight) -> tuple[Array, Array, Array]:
    """Returns, in float64, the elements of a weight [N, K], and the magnitudes of the terms of each element."""
    inputs = weight.values.shape[-1]

    def spread(numbers: Tensor, size: int) -> Array:
        return double(numbers).repeat(min(size, inputs), axis=-1)[..., :inputs]

    scales = spread(weight.scales, weight.group_size)
    if weight.super_scales is not None:
        scales = scales * spread(weight.super_scales, SUPER_GROUP)
    numbers = double(weight.values) if weight.table is None else np.array(weight.table)[weight.values.numpy()]
    zeros = np.zeros_like(scales) if weight.zeros is None else spread(weight.zeros, weight.group_size)
    offsets = np.zeros_like(scales) if weight.offsets is None else spread(weight.offsets, weight.group_size)
    if weight.super_offsets is not None:
        offsets = offsets * spread(weight.super_offsets, SUPER_GROUP)
    magnitudes = np.abs(scales) * (np.abs(numbers) + zeros) + np.abs(offsets)
    return scales * (numbers - zeros) + offsets, magnitudes, offsets


@each_implementation("linear")
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_as_exact_as_float32_allows(linear: Linear, name: str) -> None:
    weight, x = weight_of(name, 70, INPUTS), random(13, INPUTS)
    elements, magnitudes, _ = parts_of(weight)
    packed = linear.pack(weight)
    for rows in (1, 13):
        out = double(linear(x[:rows], packed))
        bound = 1e-6 * np.abs(double(x[:rows])) @ magnitudes.T
        assert (np.abs(out - double(x[:rows]) @ elements.T) <= bound).all()


@each_pair({"native": ALL_LEVELS, "name": FORMATS, "dtype": (torch.float32, torch.bfloat16)}, indirect=["native"])
def test_a_row_has_the_same_bits_among_any_number(native: Library, name: str, dtype: torch.dtype) -> None:
    linear, x = CpuLinear(), random(70, INPUTS + 3, dtype=dtype)[:, :INPUTS]
    packed, bias = linear.pack(weight_of(name, 167, INPUTS)), random(167, dtype=dtype, seed=2)
    together = linear(x, packed, bias)
    for rows in (1, 2, 3, 5, 8, 12, 13, 31, 69):
        native.set_threads(1 + rows % 2)
        start = (7 * rows) % (len(x) - rows + 1)
        assert_same(linear(x[start : start + rows], packed, bias), together[start : start + rows])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_dequantised_numbers(native: Library, name: str) -> None:
    weight, ids, linear = weight_of(name, 70, INPUTS), torch.tensor([0, 69, 31, 32, 0]), CpuLinear()
    packed = linear.pack(weight)
    assert isinstance(packed, PackedWeight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_same(linear.rows(packed, ids, dtype), weight.dequantized(ids).to(dtype))
    assert native.level()


def test_stacked_matrices_keep_their_formats(native: Library) -> None:
    names = ("Q4_K", "Q6_K", "Q8_0")
    parts = [weight_of(name, 33 + i, INPUTS, seed=i) for i, name in enumerate(names)]
    dense, x, linear = random(9, INPUTS), random(5, INPUTS), CpuLinear()
    bias = random(sum(len(part.values) for part in parts) + 9, seed=3)
    out = linear(x, linear.pack(StackedWeight((*parts, dense))), bias)
    expected = torch.cat([linear(x, linear.pack(part)) for part in (*parts, dense)], dim=1) + bias
    assert_same(out, expected)
    assert native.level()


@pytest.mark.parametrize("names", [("Q4_K", "Q6_K"), ("AWQ", "Q8_0"), ("IQ4_XS", "Q5_1")])
def test_experts_have_a_format_for_each_projection(native: Library, names: tuple[str, str]) -> None:
    """One expert with weight 1 does what `linear` and `silu_and_mul` do one after the other."""
    tokens, hidden, inner = 31, 256, 512
    gate_up, down = weight_of(names[0], 2, 2 * inner, hidden), weight_of(names[1], 2, hidden, inner, seed=1)
    run_experts, linear, silu_and_mul = CpuRunExperts(), CpuLinear(), SiluAndMul()
    x = random(tokens, hidden)
    once, ids = torch.ones(tokens, 1), torch.arange(tokens, dtype=torch.int32)[:, None] % 2
    out = run_experts(x, run_experts.pack(gate_up, down), once, ids)
    for expert in range(2):
        first, second = (linear.pack(weight.each(lambda tensor, e=expert: tensor[e])) for weight in (gate_up, down))
        assert_same(out[expert::2], linear(silu_and_mul(linear(x[expert::2], first)), second))
    assert native.level()


@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_K", 4.625), ("Q6_K", 8.5625)])
def test_packed_weights_take_what_their_file_takes(native: Library, name: str, bits: float) -> None:
    packed = CpuLinear().pack(weight_of(name, 64, 1024))
    assert isinstance(packed, PackedWeight)
    assert packed.panels.numel() == 64 * 1024 * bits / 8
    assert native.level()
