"""The Triton kernels with weights in the formats of files: exactness, layout, and which formats are refused."""

from __future__ import annotations

import pytest
import torch

from jamba_server.kernels.ops import Linear, QuantizedWeight, RunExperts, SiluAndMul, StackedWeight
from jamba_server.kernels.table import select
from jamba_server.kernels.triton import interpreted
from tests.kernels.cases import assert_same, each_implementation, random, segments
from tests.kernels.test_formats import FORMATS, weight_of
from tests.kernels.test_mamba import SLOTS, by_prefill, make_states, make_weights

pytest.importorskip("triton", reason="the package triton is not installed")

from jamba_server.kernels.triton.quantized import pack

INPUTS = 288  # two groups of the second level; the last chunk is not full
NOT_TRITON = "reference"
if not interpreted() and not torch.cuda.is_available():
    pytest.skip("it needs triton's interpreter or a GPU", allow_module_level=True)


@each_implementation("linear", but=NOT_TRITON)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_others_triton(linear: Linear, name: str) -> None:
    """The three numbers of rows have three shapes of tile."""
    x = random(67, INPUTS + 3, dtype=torch.bfloat16)[:, :INPUTS]
    packed, bias = linear.pack(weight_of(name, 41, INPUTS)), random(41, dtype=torch.bfloat16, seed=2)
    together = linear(x, packed, bias)
    for start, end in ((0, 1), (66, 67), (20, 40)):
        assert_same(linear(x[start:end], packed, bias), together[start:end])


@each_implementation("linear", but=NOT_TRITON)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_dequantised_numbers_triton(linear: Linear, name: str) -> None:
    weight, ids = weight_of(name, 7, 552), torch.tensor([0, 6, 3, 0])
    packed = linear.pack(weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(linear.rows(packed, ids, dtype), weight.dequantized(ids).to(dtype))


@each_implementation("linear", but=NOT_TRITON)
def test_stacked_matrices_keep_their_formats_triton(linear: Linear) -> None:
    parts = [weight_of(name, 35 + i, INPUTS, seed=i) for i, name in enumerate(("Q4_K", "Q6_K"))]
    # The last matrix has so few rows that its product is computed in sections.
    stacked = StackedWeight((*parts, random(40, INPUTS, seed=8), weight_of("Q8_0", 9, INPUTS, seed=9)))
    x, bias = random(5, INPUTS), random(35 + 36 + 40 + 9, seed=3)
    out, start = linear(x, linear.pack(stacked), bias), 0
    for part in stacked.parts:
        end = start + len(part if isinstance(part, torch.Tensor) else part.values)
        assert_same(out[:, start:end], linear(x, linear.pack(part), bias[start:end]))
        start = end


@each_implementation("linear", but=NOT_TRITON)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "GPTQ, whole rows"])
def test_a_narrow_product_with_a_quantised_weight_adds_its_sections_in_one_order_triton(
    linear: Linear, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jamba_server.kernels.triton import sections

    inputs = 1100  # three sections
    weight, x = weight_of(name, 33, inputs), random(18, inputs, dtype=torch.bfloat16)
    packed = linear.pack(weight)
    separately = linear(x, packed)
    expected = x.double() @ weight.dequantized().double().T
    assert (separately.double() - expected).abs().max() < 0.01 * expected.abs().max()
    assert_same(linear(x[4:5], packed), separately[4:5])
    monkeypatch.setattr(sections, "MANY_ROWS", 17)  # From this number of rows on, one program adds all sections.
    assert_same(linear(x, packed), separately)


@each_implementation("run_experts", "linear", "silu_and_mul", but=NOT_TRITON)
@pytest.mark.parametrize("names", [("Q4_K", "Q6_K"), ("AWQ", "IQ4_NL"), ("Q8_0", "MLX")])
def test_experts_have_a_format_for_each_projection_triton(
    run_experts: RunExperts, linear: Linear, silu_and_mul: SiluAndMul, names: tuple[str, str]
) -> None:
    """One expert with weight 1 does what `linear` and `silu_and_mul` do one after the other."""
    tokens, hidden, inner = 5, 96, 64
    gate_up = smaller(weight_of(names[0], 2, 2 * inner, hidden), hidden)
    down = smaller(weight_of(names[1], 2, hidden, inner, seed=1), inner)
    x, once = random(tokens, hidden, dtype=torch.bfloat16), torch.ones(tokens, 1)
    ids = torch.arange(tokens, dtype=torch.int32)[:, None] % 2
    out = run_experts(x, run_experts.pack(gate_up, down), once, ids)
    for expert in range(2):
        first, second = (linear.pack(weight.each(lambda tensor, e=expert: tensor[e])) for weight in (gate_up, down))
        assert_same(out[expert::2], linear(silu_and_mul(linear(x[expert::2], first)), second))


@pytest.mark.skipif(not interpreted(), reason="the tensors are on the CPU")
@pytest.mark.parametrize(
    ("x_proj", "dt_proj", "channels"),
    [("Q4_K", "Q5_1", 288), ("Q8_0", "Q4_0", 96), ("Q6_K", "", 288), ("AWQ", "Q3_K", 96)],
)
def test_a_decode_step_with_quantised_projections_has_the_bits_of_its_parts_triton(
    x_proj: str, dt_proj: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 288 channels x_proj is computed in two sections."""
    from jamba_server.kernels.triton import sections

    monkeypatch.setattr(sections, "SECTION", 256)
    kernels = select("cuda", {"all": "triton"})
    states, rank, rows, dtype = 8, 18, 3, torch.bfloat16
    weights = make_weights(channels, states, rank, dtype)
    if x_proj:
        weights = weights._replace(x_proj=smaller(weight_of(x_proj, rank + 2 * states, channels), channels))
    if dt_proj:
        weights = weights._replace(dt_proj=smaller(weight_of(dt_proj, channels, rank, seed=1), rank))
    weights = weights._replace(x_proj=kernels.linear.pack(weights.x_proj), dt_proj=kernels.linear.pack(weights.dt_proj))
    slots = [7 * i + 3 for i in range(rows)]
    conv, ssm = make_states(channels, states, slots, dtype)
    xz = random(rows, 2 * channels, dtype=dtype, seed=11)
    expected_conv, expected_ssm = conv.clone(), ssm.clone()
    known = segments([1] * rows, slots, [True] * rows)
    expected = by_prefill(kernels, xz, weights, expected_conv, expected_ssm, known)
    actual = kernels.mamba_decode(xz, kernels.mamba_decode.pack(weights), conv, ssm, known.state_ids)
    assert max(slots) < SLOTS and actual.isfinite().all() and actual.abs().max() > 0
    assert_same(actual, expected)
    assert_same(conv, expected_conv)
    assert_same(ssm, expected_ssm)


def smaller(weight: QuantizedWeight, inputs: int) -> QuantizedWeight:
    """Returns the weight with smaller scales and offsets, so that its elements are about 1 / sqrt(inputs).
    Products with it then neither grow nor overflow."""
    factor = 1 / (weight.dequantized().std().item() * inputs**0.5)
    name = "scales" if weight.super_scales is None else "super_scales"
    offsets = name.replace("scales", "offsets")
    changed = {key: (tensor * factor) for key in (name, offsets) if (tensor := getattr(weight, key)) is not None}
    return weight._replace(**changed)


@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_K", 4.625), ("Q6_K", 8.5625)])
def test_a_packed_weight_takes_what_its_file_takes_triton(name: str, bits: float) -> None:
    packed = pack(weight_of(name, 3, 5, 1024))
    memory = {tensor.data_ptr(): tensor.nbytes for tensor in packed.tensors}
    assert sum(memory.values()) == 15 * 1024 * bits / 8


WEIGHT, ZEROS = weight_of("Q4_K", 4, 512), weight_of("AWQ", 4, 512)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (weight_of("Q4_0", 4, 512)._replace(group_size=8), "a multiple of 16 inputs, and whole rows, not of 8"),
        (WEIGHT._replace(group_size=96), "groups that divide 256 inputs, not of 96"),
        (WEIGHT._replace(group_size=0), "not of 0"),
        (WEIGHT._replace(super_offsets=None), "both have two levels, or neither"),
        (WEIGHT._replace(super_scales=WEIGHT.scales[:, :2]), r"super_scales \(4, 2\), not torch.uint8"),
        (WEIGHT._replace(offsets=WEIGHT.scales[:, :2]), r"offsets \(4, 16\), not torch.uint8 \(4, 2\)"),
        (ZEROS._replace(values=ZEROS.values.view(torch.int8)), "zeros belong to unsigned numbers"),
        (ZEROS._replace(zeros=ZEROS.values[:, :2]), r"zeros \(4, 4\), not torch.uint8 \(4, 2\)"),
        (ZEROS._replace(table=(1.0,) * 16), "without zeros"),
        (WEIGHT._replace(table=(1.0,) * 15), "a table has 16 numbers"),
    ],
)
def test_a_format_without_a_triton_kernel_is_refused(weight: QuantizedWeight, message: str) -> None:
    if "not of 8" in message:
        weight = weight._replace(scales=weight.scales.repeat_interleave(4, dim=1))
    with pytest.raises(ValueError, match=message):
        pack(weight)
