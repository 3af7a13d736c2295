"""Every kernel for ARM, at each of its levels on an emulated processor that has nothing beyond it.

The formulas are those that test the kernels of other processors. What is shown are the bits, not the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.a8 import Linear as Int8Linear
from jamba_server.kernels.cpu.a8 import RunExperts as Int8Experts
from jamba_server.kernels.cpu.a8 import units_of
from jamba_server.kernels.cpu.attention import AttentionDecode, AttentionPrefill
from jamba_server.kernels.cpu.bitmask import ApplyBitmask
from jamba_server.kernels.cpu.conv import CausalConv1d
from jamba_server.kernels.cpu.library import ARM_LEVELS, LEVELS, NEON_EMULATED, Library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.cpu.moe import RunExperts, SiluAndMul
from jamba_server.kernels.cpu.norm import RmsNorm
from jamba_server.kernels.cpu.read import Reader
from jamba_server.kernels.cpu.route import RouteExperts
from jamba_server.kernels.cpu.sample import Sample
from jamba_server.kernels.cpu.scan import SelectiveScan
from jamba_server.kernels.cpu.slots import CompressStates, CopySlots, RestoreStates, WriteKv
from jamba_server.kernels.ops import KernelUnavailable, QuantizedWeight, ScanInputs, ScanWeights
from tests.kernels import (
    test_attention,
    test_bitmask,
    test_cpu_levels,
    test_cpu_products,
    test_cpu_read,
    test_formats,
    test_mamba,
    test_moe,
    test_quantized,
    test_recurrence,
    test_sample,
    test_slots,
)
from tests.kernels.cases import DTYPES, assert_same, random, segments
from tests.kernels.test_neon_emulated import cancelling

MANY = 2048
SOME_ROWS = [(0, 1), (1000, 1), (2047, 1), (3, 2), (5, 3), (100, 5), (1234, 6), (7, 7), (640, 40)]  # first row, rows
FORMATS = [*test_quantized.FORMATS, *test_quantized.OTHERS]


def test_the_processor_is_recognised(native: Library) -> None:
    level = native.level()
    assert native.levels() == ARM_LEVELS[: ARM_LEVELS.index(level) + 1]
    assert [units_of(lower) for lower in native.levels()] == ["neon", "neon_dot", "neon_i8mm"][: len(native.levels())]
    for other in LEVELS:
        if other not in native.levels():
            with pytest.raises(ValueError, match=f"this machine has no {other}"):
                native.set_level(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_equals_its_formula(native: Library, dtype: torch.dtype) -> None:
    test_cpu_levels.test_every_level_equals_the_formulas(native, dtype)
    test_moe.test_silu_and_mul_equals_the_formula(SiluAndMul(), dtype)
    test_cpu_products.test_experts_equal_the_formula(native, dtype)
    for outputs, inputs in test_cpu_products.SHAPES:
        for rows in (1, 5, 12):
            test_cpu_products.test_equals_the_formula(native, rows, outputs, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_quantised_weight_equals_its_formula(native: Library, dtype: torch.dtype) -> None:
    for format, group_size in FORMATS:
        test_quantized.test_whole_numbers_have_exact_products(native, format, group_size, dtype)
        for outputs, inputs in test_quantized.SHAPES[:3]:
            test_quantized.test_linear_equals_the_formula(Linear(), outputs, inputs, format, group_size, dtype)


@pytest.mark.parametrize("name", test_formats.FORMATS)
def test_every_format_of_files_equals_its_formula(native: Library, name: str) -> None:
    assert native.level()
    test_formats.test_a_product_is_as_exact_as_float32_allows(Linear(), name)
    test_formats.test_rows_are_the_dequantised_numbers(native, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_quantised_weights_equal_their_formula(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    for format, group_size in test_quantized.FORMATS:
        test_quantized.test_experts_equal_the_formula(RunExperts(), format, group_size, dtype)


def test_the_decode_of_mamba_has_the_bits_of_its_parts(native: Library) -> None:
    for dtype in DTYPES:
        for sizes in ((19, 3, 5), (160, 16, 10)):
            test_mamba.test_one_token_gives_the_bits_of_its_parts_in_prefill("cpu", 5, *sizes, dtype)
    test_mamba.test_it_equals_the_formula("cpu")
    test_mamba.test_quantised_projections_give_the_bits_of_the_parts(native, ("Q4_K", "Q5_0"))
    test_mamba.test_every_level_gives_a_row_the_same_bits_alone_and_among_others(native, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_a_recurrence_have_the_same_bits(native: Library, dtype: torch.dtype) -> None:
    for check in test_recurrence.CHECKS:
        test_cpu_levels.test_every_level_is_exact(native, check, dtype)


def test_sampling_masks_and_slots(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_sample, "sample", Sample())
    assert native.level()
    for size in (1, 37, 1500):
        test_sample.test_equals_the_oracle(size)
    test_sample.test_equals_the_oracle_with_ties()
    test_sample.test_a_row_does_not_depend_on_its_batch(4001)
    for size in (31, 500, 5000):
        test_bitmask.test_the_tokens_of_the_zeros_are_forbidden(ApplyBitmask(), size)
    for dtype in DTYPES:
        test_slots.test_write_kv_puts_every_row_in_its_place(WriteKv(), 16, dtype)
    test_slots.test_copy_slots_copies_whole_units_of_every_tensor(CopySlots())
    test_slots.test_compressed_states_are_the_nearest_of_255(CompressStates(), 16)
    test_slots.test_a_restored_state_is_half_a_step_away_at_most(CompressStates(), RestoreStates(), 16)


written = test_cpu_read.written


def test_files_are_read_as_numpy_reads_them(native: Library, written: test_cpu_read.Written) -> None:
    assert native.level()
    for number in test_cpu_read.BLOCK_TYPES:
        test_cpu_read.test_blocks_are_unpacked_as_numpy_unpacks_them(number, Reader(), written)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        test_cpu_read.test_numbers_are_read_as_they_are(dtype, Reader(), written)


def weight_of(kind: str) -> Tensor | QuantizedWeight:
    """A weight [40, 70] of one kind: a dtype, a format of the quantisation, or the name of a format of files."""
    if kind in test_formats.FORMATS:
        return test_formats.weight_of(kind, 40, 70)
    if kind in test_quantized.HIGHEST:
        return test_quantized.quantized(40, 70, format=kind, group_size=32)
    return random(40, 70, dtype=getattr(torch, kind), seed=1)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "fp8", "Q5_1", "IQ4_NL"])
def test_a_product_has_the_same_bits_alone_and_among_many(native: Library, kind: str) -> None:
    assert native.level()
    weight = weight_of(kind)
    x = random(MANY, 70, dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    for linear in (Linear(), Int8Linear(Linear())):
        packed = linear.pack(weight)
        together = linear(x, packed)
        for first, rows in SOME_ROWS:
            assert_same(linear(x[first : first + rows], packed), together[first : first + rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_have_the_same_bits_alone_and_among_many(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    gate_up, down = random(3, 38, 40, dtype=dtype, seed=1), random(3, 40, 19, dtype=dtype, seed=2)
    blocks = test_formats.weight_of("Q4_0", 3, 38, 40), test_formats.weight_of("Q8_0", 3, 40, 19)
    x, generator = random(MANY, 40, dtype=dtype), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(MANY)]).int()
    weights = torch.softmax(random(MANY, 2, seed=3), dim=-1)
    for run_experts, matrices in (
        (RunExperts(), (gate_up, down)),
        (RunExperts(), blocks),
        (Int8Experts(RunExperts()), blocks),
    ):
        packed = run_experts.pack(*matrices)
        together = run_experts(x, packed, weights, ids)
        for first, rows in SOME_ROWS:
            part = slice(first, first + rows)
            assert_same(run_experts(x[part], packed, weights[part], ids[part]), together[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_ops_have_the_same_bits_alone_and_among_many(native: Library, dtype: torch.dtype) -> None:
    assert native.level()
    x, weight = random(MANY, 46, dtype=dtype), random(46, dtype=dtype, seed=1)
    calls: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
        lambda x: RmsNorm()(x, weight, 1e-6, x.flip(1)),
        lambda x: RouteExperts()(x[:, :11], 3),
        lambda x: (SiluAndMul()(x),),
    ]
    for call in calls:
        together = call(x)
        for first, rows in SOME_ROWS:
            for part, whole in zip(call(x[first : first + rows]), together, strict=True):
                assert_same(part, whole[first : first + rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_same_bits_at_once_and_in_pieces(native: Library, dtype: torch.dtype) -> None:
    """Convolution, scan and attention of a prompt: its last rows alone are those of the whole prompt."""
    channels, states = 22, 16
    sizes = (channels, channels, states, states, channels)
    inputs = ScanInputs(*(random(MANY, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)))
    weights = ScanWeights(*(random(*shape, seed=7) for shape in ((channels, states), (channels,), (channels,))))
    weights = weights._replace(a=-torch.exp(weights.a))
    conv_weight, conv_bias = random(4, channels, dtype=dtype, seed=10), random(channels, dtype=dtype, seed=11)

    def run(cuts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ssm, conv, scanned = torch.zeros(1, channels, states), torch.zeros(1, 3, channels, dtype=dtype), list[Tensor]()
        for start, end in pairwise(cuts):
            rows, known = slice(start, end), segments([end - start], [0], [start > 0])
            u = CausalConv1d()(inputs.u[rows], conv_weight, conv_bias, conv, known)
            part = ScanInputs(*(tensor[rows] for tensor in inputs))._replace(u=u)
            scanned.append(SelectiveScan()(part, weights, ssm, known))
        return torch.cat(scanned), ssm, conv

    for part, whole in zip(run((0, 1, 600, 601, 1333, MANY)), run((0, MANY)), strict=True):
        assert_same(part, whole)
    native.set_threads(2)
    context = 530  # two splits
    k, v = test_attention.keys_and_values(context, 1, 24, dtype)
    q = random(context, 2, 24, dtype=dtype, seed=9)
    pages = test_cpu_levels.long_pages([(k, v)], 0)
    whole = AttentionPrefill()(q, pages, test_attention.query_start([context]), context, 0.3)
    for rows in (1, 3, 40):
        last = AttentionPrefill()(q[-rows:], pages, test_attention.query_start([rows]), rows, 0.3)
        assert_same(last, whole[-rows:])
    assert_same(AttentionDecode()(q[-1:], pages, 0.3), whole[-1:])


class Here(NamedTuple):
    """Products of this machine's library: with 8-bit activations by their format, and with bf16 by the emulation of
    BFMMLA."""

    eight_bits: dict[str, Tensor]
    emulated: dict[str, Tensor]


NAMES = [name for name in test_formats.FORMATS if name != "NF4"]


def eight_bit_products() -> dict[str, Tensor]:
    linear = Int8Linear(Linear())
    x = random(13, 552, dtype=torch.bfloat16, scale=3)
    return {name: linear(x, linear.pack(test_formats.weight_of(name, 70, 552))) for name in NAMES}


def bf16_products(linear: Linear) -> dict[str, Tensor]:
    """Of plain weights whose products are of all magnitudes, and of quantised ones. K is odd, and no multiple of 4."""
    found: dict[str, Tensor] = {}
    for inputs, scale in ((1, 1.0), (70, 1.0), (333, 1.0), (128, 3e-20), (64, 1e19)):
        x = random(9, inputs, dtype=torch.bfloat16, scale=scale)
        weight = random(45, inputs, dtype=torch.bfloat16, seed=1, scale=scale)
        found[f"{inputs} inputs, {scale}"] = linear(x, linear.pack(weight))
    for inputs in (30, 64, 1300):
        x, weight, _ = cancelling(inputs)
        found[f"{inputs} inputs, last bits"] = linear(x, linear.pack(weight))
    for format, group_size in FORMATS:
        weight = test_quantized.quantized(45, 333, format=format, group_size=group_size)
        found[f"{format}, {group_size}"] = linear(random(7, 333, dtype=torch.bfloat16), linear.pack(weight))
    for name in test_formats.FORMATS:
        found[name] = linear(random(7, 552, dtype=torch.bfloat16), linear.pack(test_formats.weight_of(name, 45, 552)))
    return found


@pytest.fixture(scope="session")
def here() -> Here:
    """Runs before the library is replaced, because it belongs to the session."""
    try:
        return Here(eight_bit_products(), bf16_products(Linear(NEON_EMULATED)))
    except KernelUnavailable as error:
        pytest.skip(str(error))


def test_products_with_8_bit_activations_have_the_bits_of_this_machine(here: Here, native: Library) -> None:
    assert native.level() in ARM_LEVELS
    for name, product in eight_bit_products().items():
        assert_same(product, here.eight_bits[name])


@pytest.mark.parametrize("native", ["neon_bf16"], indirect=True)
def test_bf16_products_have_the_bits_of_their_emulation_on_this_machine(here: Here, native: Library) -> None:
    assert native.level() == "neon_bf16"
    for name, product in bf16_products(Linear()).items():
        assert_same(product, here.emulated[name])
