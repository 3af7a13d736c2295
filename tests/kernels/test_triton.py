"""What is particular to the Triton kernels: borders of tiles and splits, sampling, and where they cannot run."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import jamba_server.kernels.triton
from jamba_server.kernels import table
from jamba_server.kernels.cpu.linear import Linear as CpuLinear
from jamba_server.kernels.gated_linear import GatedLinear
from jamba_server.kernels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Kernels,
    KernelUnavailable,
    Linear,
    Pages,
    QuantizedWeight,
    RunExperts,
    Sample,
    SiluAndMul,
)
from jamba_server.kernels.ops import SampleInputs as Inputs
from jamba_server.kernels.reference.sample import sample as reference_sample
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, EXACT_DTYPES, assert_close, assert_same, double, each_implementation, random
from tests.kernels.test_attention import SCALE, keys_and_values, paged, query_start, slack
from tests.kernels.test_quantized import FORMATS, quantized

SPLIT = 512  # keys, of attention
TILE = 64  # rows of a product, up to which another shape of tile computes it
FORMATS_AND_DTYPES = [("", torch.float32), *((format, torch.bfloat16) for format in ("", "int8", "int4"))]


@each_implementation("attention_prefill", "attention_decode")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("context", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 5])
def test_splits_of_keys_are_merged(
    attention_prefill: AttentionPrefill, attention_decode: AttentionDecode, context: int, dtype: torch.dtype
) -> None:
    known = [keys_and_values(length, 1, 16, dtype, seed) for seed, length in enumerate((context, 3))]
    pages, q = paged(known, 16), random(4 + 3, 2, 16, dtype=dtype, seed=9)
    out = attention_prefill(q, pages, query_start([4, 3]), 4, SCALE)
    for rows, (k, v) in zip((slice(0, 4), slice(4, 7)), known, strict=True):
        expected = oracle.attention(double(q[rows]), double(k), double(v), SCALE)
        assert_close(out[rows], expected, atol=slack(attention_prefill, dtype))
    assert_same(attention_decode(q[[3, 6]], pages, SCALE), out[[3, 6]])


@each_implementation("attention_prefill", "attention_decode")
def test_a_value_that_is_not_finite_reaches_no_token_of_the_split_before(
    attention_prefill: AttentionPrefill, attention_decode: AttentionDecode
) -> None:
    """The tile has tokens of both splits, and those of the first see no key of the second."""
    context, first, bad = SPLIT + 9, SPLIT - 6, SPLIT + 3
    k, v = keys_and_values(context, 1, 16, torch.bfloat16)
    q = random(context - first, 4, 16, dtype=torch.bfloat16, seed=9)
    v[bad] = torch.nan
    out = attention_prefill(q, paged([(k, v)], 16), query_start([len(q)]), len(q), SCALE)
    assert out.isnan().all(2).all(1).tolist() == [first + row >= bad for row in range(len(q))]
    known = [(k[: first + row + 1], v[: first + row + 1]) for row in range(len(q))]
    assert_same(attention_decode(q, paged(known, 16), SCALE), out)


@each_implementation("attention_prefill", but="reference")
@pytest.mark.parametrize(
    ("bad", "again"), [([], 0), ([0], 0), ([31], 0), ([31, 36], 8), ([32], 8), ([38], 8), ([39], 0), ([40], 2)]
)
def test_a_tile_is_computed_again_only_for_values_that_not_all_its_tokens_see(
    attention_prefill: AttentionPrefill, bad: list[int], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only chunk has a tile for the tokens 31 to 38, and one for the tokens 39 and 40. A tile that is computed
    again has one pass more for each of its tokens."""
    attention = pytest.importorskip(
        "jamba_server.kernels.triton.attention", reason="the package triton is not installed"
    )
    if not jamba_server.kernels.triton.interpreted():
        pytest.skip("the passes of a compiled kernel cannot be counted")
    k, v = keys_and_values(41, 1, 16, torch.bfloat16)
    v[bad] = torch.nan
    calls, attend = list[object](), attention.attend_splits
    monkeypatch.setattr(attention, "attend_splits", lambda *args: calls.append(args) or attend(*args))
    attention_prefill(random(10, 8, 16, dtype=torch.bfloat16), paged([(k, v)], 16), query_start([10]), 10, SCALE)
    assert len(calls) == 2 + again


@each_implementation("attention_prefill", "attention_decode")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 40])
def test_wide_heads(
    attention_prefill: AttentionPrefill, attention_decode: AttentionDecode, dtype: torch.dtype, heads: int
) -> None:
    """Of more values than a program holds; of float32 also of so many bytes that a tile has fewer rows."""
    [(k, v)] = known = [keys_and_values(21, 2, 200, dtype)]
    pages, q = paged(known, 16), random(5, heads, 200, dtype=dtype, seed=9)
    out = attention_prefill(q, pages, query_start([5]), 5, 0.07)
    expected = oracle.attention(double(q), double(k), double(v), 0.07)
    assert_close(out, expected, atol=slack(attention_prefill, dtype))
    assert_same(attention_decode(q[4:], pages, 0.07), out[4:])


@each_implementation("attention_decode", but="reference")
@pytest.mark.parametrize("at_once", [0, 1, 2, 3, 5])
def test_rows_of_decode_go_in_groups(
    attention_decode: AttentionDecode, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = pytest.importorskip(
        "jamba_server.kernels.triton.attention", reason="the package triton is not installed"
    )
    contexts, heads, size = (3, SPLIT + 1, 40, 1, 600), 2, 16
    pages = paged([keys_and_values(n, 1, size, torch.bfloat16, seed) for seed, n in enumerate(contexts)], 16)
    q = random(len(contexts), heads, size, dtype=torch.bfloat16, seed=9)
    together = attention_decode(q, pages, SCALE)
    monkeypatch.setattr(attention, "PARTIAL_BYTES", at_once * 4 * heads * 2 * (size + 2))  # two splits
    assert_same(attention_decode(q, pages, SCALE), together)


@each_implementation("attention_decode", but="reference")
@pytest.mark.parametrize("programs", [1, 7])
def test_a_program_of_decode_may_compute_several_splits(
    attention_decode: AttentionDecode, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 7 programs for the three pairs of a sequence and a KV head, each has two: they share three splits."""
    attention = pytest.importorskip(
        "jamba_server.kernels.triton.attention", reason="the package triton is not installed"
    )
    contexts, size = (3, 2 * SPLIT + 1, SPLIT), 16
    pages = paged([keys_and_values(n, 1, size, torch.bfloat16, seed) for seed, n in enumerate(contexts)], 16)
    q = random(len(contexts), 2, size, dtype=torch.bfloat16, seed=9)
    alone = attention_decode(q, pages, SCALE)
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", programs)
    assert_same(attention_decode(q, pages, SCALE), alone)


def some_weight(*shape: int, format: str, dtype: torch.dtype, seed: int) -> Tensor | QuantizedWeight:
    """Returns a random weight, which is quantised unless `format` is empty."""
    if not format:
        return random(*shape, dtype=dtype, seed=seed)
    return quantized(*shape, format=format, group_size=dict(FORMATS)[format], seed=seed)


@each_implementation("linear", but="reference")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("format", ["", *dict(FORMATS)])
def test_a_row_of_a_product_has_the_same_bits_in_every_tile(linear: Linear, format: str, dtype: torch.dtype) -> None:
    x = random(2 * TILE + 3, 150, dtype=dtype)
    weight = linear.pack(some_weight(70, 150, format=format, dtype=dtype, seed=1))
    bias = random(70, dtype=dtype, seed=2)
    together = linear(x, weight, bias)
    for start, end in ((0, 1), (70, 71), (20, 36), (50, 67), (3, 3 + TILE), (0, TILE + 1), (100, 131)):
        assert_same(linear(x[start:end], weight, bias), together[start:end])


@each_implementation("linear", but="reference")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("inputs", [512, 1100])  # K in one section, and in three
def test_a_narrow_product_adds_its_sections_in_one_order(
    linear: Linear, inputs: int, with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = pytest.importorskip("jamba_server.kernels.triton.sections", reason="the package triton is not installed")
    x, raw = random(TILE + 3, inputs + 7, dtype=dtype)[:, :inputs], random(33, inputs, dtype=dtype, seed=1)
    weight, bias = linear.pack(raw), random(33, dtype=dtype, seed=2) if with_bias else None
    separately = linear(x, weight, bias)
    expected = double(x) @ double(raw).T + (0 if bias is None else double(bias))
    assert_close(separately, expected, atol=1e-4)
    assert_same(linear(x[65:66], weight, bias), separately[65:66])
    monkeypatch.setattr(sections, "MANY_ROWS", TILE)  # from where on one program adds them all
    assert_same(linear(x, weight, bias), separately)


@each_implementation("linear", but="reference")
@pytest.mark.parametrize(("format", "dtype"), FORMATS_AND_DTYPES)
def test_a_weight_with_few_rows_has_sections_whatever_the_number_of_rows(
    linear: Linear, format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each section has a program of its own for few rows, and all have one for many. A row has the same bits, which
    are those of the sections' own products, added in order."""
    sections = pytest.importorskip("jamba_server.kernels.triton.sections", reason="the package triton is not installed")
    monkeypatch.setattr(sections, "LEAST_INPUTS", 512)
    monkeypatch.setattr(sections, "PROGRAMS", 6)
    outputs, inputs = 70, 540  # a section has 256 inputs, and the last one has 28
    assert (sections.is_narrow(outputs, inputs), sections.section_of(outputs, inputs)) == (False, 256)
    x, raw = random(TILE + 3, inputs, dtype=dtype), some_weight(outputs, inputs, format=format, dtype=dtype, seed=1)
    weight, bias = linear.pack(raw), random(outputs, dtype=dtype, seed=2)
    together = linear(x, weight, bias)
    for start, end in ((0, 1), (66, 67), (20, 36), (10, 50)):
        assert_same(linear(x[start:end], weight, bias), together[start:end])
    monkeypatch.setattr(sections, "MANY_ROWS_WIDE", TILE)
    assert_same(linear(x, weight, bias), together)
    numbers = raw if isinstance(raw, Tensor) else raw.dequantized()
    total = double(x) @ double(numbers).T + double(bias)
    assert_close(together, total, atol=1e-3 if dtype == torch.float32 else 1e-1)
    if not format and not isinstance(linear, CpuLinear):  # the CPU's kernels do not divide K
        parts = torch.empty(3, len(x), outputs, device=x.device)
        for part, start in zip(parts, range(0, inputs, 256), strict=True):
            linear.sums(x[:, start : start + 256], linear.pack(numbers[:, start : start + 256]), part)
        assert_same((parts[0] + parts[1] + parts[2] + bias.float()).to(dtype), together)


@each_implementation("run_experts", but="reference")
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("format", ["", *dict(FORMATS)])
def test_a_token_has_the_same_bits_whoever_else_chose_its_experts(
    run_experts: RunExperts, format: str, dtype: torch.dtype
) -> None:
    tokens = 70  # expert 1's rows fill a tile and more, expert 2 has none
    x = random(tokens, 24, dtype=dtype)
    gate_up = some_weight(4, 20, 24, format=format, dtype=dtype, seed=1)
    experts = run_experts.pack(gate_up, some_weight(4, 24, 10, format=format, dtype=dtype, seed=2))
    ids = torch.tensor([[1, 3 * (t % 2)] for t in range(tokens)], dtype=torch.int32)
    weights = torch.softmax(random(tokens, 2, seed=3), dim=-1)
    together = run_experts(x, experts, weights, ids)
    for start, end in ((0, 1), (69, 70), (5, 12), (5, 40)):
        assert_same(run_experts(x[start:end], experts, weights[start:end], ids[start:end]), together[start:end])


INTERPRETED_ONLY = pytest.mark.skipif(
    not jamba_server.kernels.triton.interpreted(), reason="shows tiles of another GPU in triton's interpreter"
)


@INTERPRETED_ONLY
@pytest.mark.parametrize("format", ["", "int8", "int4"])
def test_a_row_has_the_same_bits_in_the_largest_tiles(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of GPUs of compute capability 9: 128 x 256, and 128 rows of a weight with one scale in a row."""
    from jamba_server.kernels.triton import product
    from jamba_server.kernels.triton.linear import Linear as TritonLinear

    linear, dtype = TritonLinear(), torch.bfloat16
    x, weight = random(2 * TILE + 3, 150, dtype=dtype), some_weight(300, 150, format=format, dtype=dtype, seed=1)
    packed: Any = linear.pack(weight)
    stored = packed.format if format else ""
    usual, usual_tile = linear(x, packed), product.tile_for(len(x), 2, stored, 300)
    monkeypatch.setattr(product, "capability", lambda: (9, 0))
    monkeypatch.setattr(product, "WIDE_PROGRAMS", 1)
    monkeypatch.setattr("triton._utils.TRITON_MAX_TENSOR_NUMEL", 1 << 21)  # the interpreter multiplies by hand
    tile = product.tile_for(len(x), 2, stored, 300)
    assert (tile == usual_tile) == (format == "int4")
    assert_same(linear(x, packed), usual)


@INTERPRETED_ONLY
def test_a_row_of_attention_has_the_same_bits_in_the_largest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of GPUs of compute capability 9: 64 keys in a block, and in prefill 128 rows. Fewer rows than 64 do not
    take the larger tile."""
    from jamba_server.kernels.triton import attention

    monkeypatch.setattr(attention, "capability", lambda: (9, 0))
    known = [keys_and_values(length, 2, 16, torch.bfloat16, seed) for seed, length in enumerate((SPLIT + 40, 90, 3))]
    pages, q = paged(known, 16), random(40 + 80 + 3, 4, 16, dtype=torch.bfloat16, seed=9)
    tile = attention._tile(q, pages, 80)  # pyright: ignore[reportPrivateUsage]
    assert (tile["ROWS"], tile["KEYS"]) == (128, 64)
    together = attention.attention_prefill(q, pages, query_start([40, 80, 3]), 80, SCALE)
    for rows, (k, v) in zip((slice(0, 40), slice(40, 120), slice(120, 123)), known, strict=True):
        expected = oracle.attention(double(q[rows]), double(k), double(v), SCALE)
        assert_close(together[rows], expected, atol=slack(attention.attention_prefill, torch.bfloat16))
    assert_same(attention.attention_decode(q[[39, 119, 122]], pages, SCALE), together[[39, 119, 122]])
    last = Pages(pages.k, pages.v, pages.block_tables[1:2], pages.context_lens[1:2], pages.max_context_len)
    assert attention._tile(q, last, 5)["ROWS"] == TILE  # pyright: ignore[reportPrivateUsage]
    assert_same(attention.attention_prefill(q[115:120], last, query_start([5]), 5, SCALE), together[115:120])


@INTERPRETED_ONLY
@pytest.mark.parametrize("few", [16, 4096])
def test_the_search_for_a_cut_may_leave_the_registers(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 16 candidates, rows with many equal logits have more of one key. Some rows have tokens that are
    forbidden, and more are wanted than are left."""
    from jamba_server.kernels.triton import sample as module

    monkeypatch.setattr(module, "CANDIDATES", few)
    rows, size = 24, 3000
    logits, inputs = random(rows, size, scale=2), mixed_inputs(rows)
    logits[1::4] = logits[1::4].round()
    logits[2::6, 5:] = -torch.inf
    logits[3::8] *= 1e-30
    inputs = inputs._replace(top_k=torch.where(torch.arange(rows) % 3 == 0, 40, inputs.top_k).int())
    assert module.sample(logits.clone(), inputs).tolist() == reference_sample(logits, inputs).tolist()


@INTERPRETED_ONLY
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 2), (700, 16, 2), (40, 5, 1), (1000, 3, 3)])
def test_choices_are_sorted_by_expert(tokens: int, experts: int, top_k: int) -> None:
    """Stably, also where they take several blocks. The last expert is nobody's choice, if there are enough."""
    from jamba_server.kernels.triton.moe import group_by_expert

    few = max(experts - 1, top_k)
    ids = torch.stack([torch.randperm(few, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(tokens)])
    groups = group_by_expert(ids.int(), experts)
    expected = ids.flatten().sort(stable=True)
    assert groups.entries.tolist() == expected.indices.tolist()
    assert groups.start.tolist() == torch.searchsorted(expected.values, torch.arange(experts + 1)).tolist()


@each_implementation("linear", "silu_and_mul", but="reference")
@pytest.mark.parametrize(("format", "dtype"), FORMATS_AND_DTYPES)
def test_a_gated_product_has_the_bits_of_the_product_and_the_activation(
    linear: Linear, silu_and_mul: SiluAndMul, format: str, dtype: torch.dtype
) -> None:
    """Alone, and among others in every shape of tile. Another activation is called as it is."""
    if not isinstance(linear, GatedLinear):
        pytest.skip("this implementation computes the activation by itself")
    x = random(2 * TILE + 3, 157, dtype=dtype)[:, :150]
    weight = linear.pack(some_weight(2 * 37, 150, format=format, dtype=dtype, seed=1))
    together = silu_and_mul(linear(x, weight))
    for start, end in ((0, 2 * TILE + 3), (0, 1), (20, 36), (50, 67), (3, 3 + TILE)):
        assert_same(linear.gated(x[start:end], weight, silu_and_mul), together[start:end])
    assert_same(linear.gated(x, weight, lambda gate_up: -silu_and_mul(gate_up)), -together)


@each_implementation("linear", but="reference")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", dict(FORMATS))
def test_every_number_of_a_format_is_met_exactly(linear: Linear, format: str, dtype: torch.dtype) -> None:
    weight = quantized(9, 150, format=format, group_size=dict(FORMATS)[format])
    weight = weight._replace(scales=torch.ones_like(weight.scales))
    assert len(set(weight.values.float().flatten().tolist())) == {"int8": 255, "int4": 15, "fp8": 253}[format]
    assert_same(linear(torch.eye(150, dtype=dtype), linear.pack(weight)), weight.values.to(dtype).t())


REFUSED = quantized(4, 300, format="int4", group_size=128)


@pytest.mark.parametrize("format", dict(FORMATS))
def test_a_packed_weight_is_as_small_as_its_numbers(format: str) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from jamba_server.kernels.triton.quantized import pack

    packed = pack(quantized(3, 5, 1000, format=format, group_size=dict(FORMATS)[format]))
    assert packed.words.shape[:2] == (3, 5)
    assert packed.words.nbytes == 15 * 1024 // (2 if format == "int4" else 1)
    assert packed.scales.shape == (8 if format == "int4" else 1, 1, 15)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (REFUSED._replace(bits=3), "read int8 and uint8 of 4 and 8 bits, and float8_e4m3fn, not torch.int8 of 3"),
        (REFUSED._replace(values=REFUSED.values.short()), "not torch.int16 of 4 bits"),
        (REFUSED._replace(group_size=40, scales=REFUSED.scales.repeat(1, 3)[:, :8]), "multiple of 16 inputs"),
        (REFUSED._replace(scales=REFUSED.scales[:, :2]), r"float16 scales \(4, 3\), not torch.float32 \(4, 2\)"),
        (REFUSED._replace(scales=REFUSED.scales.double()), "not torch.float64"),
    ],
)
def test_a_weight_without_a_triton_kernel_for_it_is_refused(weight: QuantizedWeight, message: str) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from jamba_server.kernels.triton.linear import Linear

    with pytest.raises(ValueError, match=message):
        Linear().pack(weight)


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    return Inputs(*(field[rows] for field in inputs))


def mixed_inputs(rows: int) -> Inputs:
    """Greedy rows, noisy ones, and every filter."""
    number = torch.arange(rows)
    return Inputs(
        temperature=torch.tensor([0.0, 0.4, 1.0, 1.7])[number % 4],
        top_p=torch.where(number % 7 == 0, 0.8, 1.0),
        min_p=torch.where(number % 3 == 0, 0.05, 0.0),
        top_k=torch.where(number % 5 == 0, 4, 0).int(),
        keys=number * 0x2545F4914F6CDD1D,
    )


@each_implementation("sample")
@pytest.mark.parametrize("size", [1, 37, 5000])
def test_sample_draws_what_the_reference_draws(sample: Sample, size: int) -> None:
    rows = 24
    logits, inputs = random(rows, size, scale=2), mixed_inputs(rows)
    tokens = sample(logits.clone(), inputs)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == reference_sample(logits, inputs).tolist()
    for rows in (slice(2, 3), slice(5, 9)):
        assert_same(sample(logits[rows].clone(), rows_of(inputs, rows)), tokens[rows])


@each_implementation("sample")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_sample_at_the_ends(sample: Sample) -> None:
    logits = torch.full((4, 6), -torch.inf)
    logits[1, [2, 4]] = 1.0  # a tie, of which greedy takes the first
    logits[2, 5] = -3e38
    logits[3] = torch.tensor([0.0, 3e38, -3e38, 1e30, 0.0, 0.0])
    inputs = rows_of(mixed_inputs(8), slice(4, 8))._replace(temperature=torch.tensor([1.0, 0.0, 1.0, 1e-30]))
    assert sample(logits, inputs._replace(top_k=torch.zeros(4).int(), top_p=torch.ones(4))).tolist() == [0, 2, 5, 1]


def test_every_op_has_its_type() -> None:
    """Written out, so that the type checker compares every op with its protocol."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from jamba_server.kernels.triton import (
        attention,
        bitmask,
        conv,
        gated,
        linear,
        mamba,
        moe,
        norm,
        route,
        sample,
        scan,
        slots,
    )

    ops = Kernels(
        rms_norm=norm.rms_norm,
        causal_conv1d=conv.causal_conv1d,
        causal_conv1d_update=conv.causal_conv1d_update,
        selective_scan=scan.selective_scan,
        selective_state_update=scan.selective_state_update,
        write_kv=slots.write_kv,
        attention_prefill=attention.attention_prefill,
        attention_decode=attention.attention_decode,
        copy_slots=slots.copy_slots,
        compress_states=slots.compress_states,
        restore_states=slots.restore_states,
        silu_and_mul=gated.silu_and_mul,
        route_experts=route.route_experts,
        run_experts=moe.RunExperts(),
        linear=linear.Linear(),
        sample=sample.sample,
        apply_bitmask=bitmask.apply_bitmask,
        mamba_decode=mamba.MambaDecode(
            conv.causal_conv1d_update, linear.Linear(), norm.rms_norm, scan.selective_state_update
        ),
        names={},
    )
    if jamba_server.kernels.triton.interpreted():
        chosen = table.select("cuda", {"all": "triton"})
        for op in table.OPS:
            assert getattr(chosen, op) == getattr(ops, op) or type(getattr(chosen, op)) is type(getattr(ops, op))


@pytest.mark.parametrize(
    ("installed", "cuda", "capability", "reason"),
    [
        (False, True, (9, 0), "the package triton is not installed"),
        (True, False, (9, 0), "torch sees no CUDA device"),
        (True, True, (7, 5), "the GPU has compute capability 7.5; 8.0 is needed"),
        (True, True, (8, 0), None),
    ],
)
def test_reasons(
    installed: bool, cuda: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(jamba_server.kernels.triton, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(jamba_server.kernels.triton, "import_module", lambda name: MagicMock())
    if reason is None:
        jamba_server.kernels.triton.ensure_available()
    else:
        with pytest.raises(KernelUnavailable, match=reason):
            jamba_server.kernels.triton.ensure_available()


def test_no_compiler_for_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out when kernels are chosen, not in the first step."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    runtime = MagicMock()
    runtime.driver.active.get_current_target.side_effect = RuntimeError("Failed to find C compiler.")
    monkeypatch.setattr(jamba_server.kernels.triton, "import_module", lambda name: runtime)
    with pytest.raises(KernelUnavailable, match=r"needs a C compiler .* Failed to find C compiler"):
        jamba_server.kernels.triton.ensure_available()
