"""Weight formats against numpy, which weights get one, what they weigh, and what they cost in quality."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.engine.config import EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.layers.parameter import Raw
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import Model, build_model
from jamba_server.engine.quantization import FORMATS, UNQUANTIZED, QuantizationPolicy, Role
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.engine.start.weights import dummy_weights, fill_unit, load_weights
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_sizes import step_bytes, weight_bytes
from jamba_server.kernels.ops import Kernels, QuantizedWeight
from jamba_server.kernels.table import select
from jamba_server.llm import LLM
from jamba_server.server.demo import demo_folder
from tests.engine.test_weights import Tensors, fuse, logits, rewrite, shard, tensors_of, write_checkpoint
from tests.geometries import write_geometry

CPU = torch.device("cpu")
NAMES: tuple[Quantization, ...] = ("int8", "int4", "int4-g32", "fp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRODUCTS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")} | {"lm_head"}
REFERENCE = {"linear": "reference", "run_experts": "reference"}
Array = np.ndarray[Any, Any]


# Formats ------------------------------------------------------------------------------------------------------------


def groups_of(values: Array, size: int) -> list[Array]:
    """Splits numbers [..., K] into groups along K. The last group may be shorter."""
    return [values[..., start : start + size] for start in range(0, values.shape[-1], size)]


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Returns random weights with heavy tails, as trained weights have them."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, shape)).to(dtype)


def exact(weight: QuantizedWeight) -> Array:
    """Returns the float64 numbers that a quantised weight stands for."""
    values, scales = weight.values.double().numpy(), weight.scales.double().numpy()
    return values * np.repeat(scales, weight.group_size, axis=-1)[..., : values.shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 4, 256), (2, 1), (300, 1031)])
def test_int8_is_numpys(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, dtype=dtype)
    wide = weight.float().numpy()
    scales = np.abs(wide).max(-1, keepdims=True) / np.float32(127)
    result = quantize(weight, "int8")
    assert (result.bits, result.group_size) == (8, shape[-1])
    assert (result.values.dtype, result.scales.dtype) == (torch.int8, torch.float32)
    np.testing.assert_array_equal(result.scales.numpy(), scales)
    np.testing.assert_array_equal(result.values.numpy(), np.rint(wide / scales))
    assert result.values.abs().amax(-1).eq(127).all(), "each row's largest weight is an end of the range"


def e4m3(values: Array) -> Array:
    """Rounds numbers to the nearest number of float8_e4m3fn, ties to the one with an even last bit."""
    bits = np.arange(0x7F)  # of the numbers that are finite and not negative, ascending
    exponents, mantissas = bits >> 3, bits & 7
    known = np.where(exponents > 0, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * 2.0**-9)
    upper = np.searchsorted(known, np.abs(values)).clip(1, len(known) - 1)
    below, above = np.abs(values) - known[upper - 1], known[upper] - np.abs(values)
    take_lower = (below < above) | ((below == above) & (upper % 2 == 1))
    return np.copysign(known[upper - take_lower], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 4, 256), (2, 1), (300, 1031)])
def test_fp8_is_rounded_to_nearest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, dtype=dtype)
    weight[..., 0] *= 100  # so that small ones become subnormal
    wide = weight.float().numpy()
    scales = np.abs(wide).max(-1, keepdims=True) / np.float32(448)
    result = quantize(weight, "fp8")
    assert (result.bits, result.group_size) == (8, shape[-1])
    assert (result.values.dtype, result.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    np.testing.assert_array_equal(result.scales.numpy(), scales)
    np.testing.assert_array_equal(result.values.double().numpy(), e4m3(wide / scales))
    assert result.values.float().abs().amax(-1).eq(448).all(), "each row's largest weight is an end of the range"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (3, 4, 256), (2, 129), (300, 1031)])
def test_int4_is_the_best_of_the_clippings_that_it_tries(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, dtype=dtype)
    result = quantize(weight, "int4")
    assert (result.bits, result.group_size) == (4, 128)
    assert result.scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert result.values.shape == shape
    assert result.values.abs().max() == 7
    wide, found = weight.double().numpy(), exact(result)
    gained = 0.0
    for i, (part, taken) in enumerate(zip(groups_of(wide, 128), groups_of(found, 128), strict=True)):
        error = ((part - taken) ** 2).sum(-1)
        scale = result.scales[..., i].double().numpy()
        assert (np.abs(part - taken) <= np.maximum(scale / 2, np.abs(part).max(-1) * 0.2001)[..., None]).all()
        for ratio in (1.0, 0.95, 0.9, 0.85, 0.8):
            step = np.abs(part).max(-1, keepdims=True) / 7 * ratio
            other = ((part - np.rint(part / step).clip(-7, 7) * step) ** 2).sum(-1)
            assert (error <= other * (1 + 1e-5) + 1e-12).all()
            gained += float((other - error).sum()) if ratio == 1.0 else 0.0
    assert gained > 0, "clipping must have been worth it somewhere"


def test_int4_g32_has_half_precision_scales_near_those_of_int4() -> None:
    weight = random_weight(30, 100, dtype=torch.float32)
    result = quantize(weight, "int4-g32")
    assert (result.bits, result.group_size) == (4, 32)
    assert (result.scales.dtype, result.scales.shape) == (torch.float16, (30, 4))
    for i, part in enumerate(weight.split(32, dim=-1)):
        exact_scales = quantize(part, "int4").scales[:, 0]
        assert torch.equal(result.scales[:, i], exact_scales.half())
        rounded = (part / result.scales[:, i, None].float()).round().clamp(-7, 7)
        assert torch.equal(result.values[:, 32 * i : 32 * (i + 1)].float(), rounded)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_the_smallest_numbers_give_finite_scales(name: Quantization) -> None:
    weight = torch.zeros(4, 300)
    weight[1, 7] = 1e-45  # the smallest float32: its scale would be 0
    weight[2, 3] = 1e-38
    weight[3, 299] = -2.0
    result = quantize(weight, name)
    assert result.scales.isfinite().all()
    assert (result.scales > 0).all()
    # float16 scales have 11 bits, and the smallest one is 2^-24
    rtol, atol = (2.0**-11, 2.0**-25) if result.scales.dtype == torch.float16 else (1e-6, 1e-42)
    np.testing.assert_allclose(exact(result), weight.double().numpy(), rtol=rtol, atol=atol)
    assert result.values[0].float().eq(0).all()
    assert result.values[3, 299].item() == -FORMATS[name].limit


def bits_of(weight: QuantizedWeight) -> Tensor:
    return weight.values.view(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_neighbours_change_no_bit(name: Quantization) -> None:
    weight, threads = random_weight(700, 1100), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = quantize(weight, name)
        torch.set_num_threads(2)
        two = quantize(weight, name)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits_of(one), bits_of(two))
    assert torch.equal(one.scales, two.scales)
    alone = quantize(weight[431:432], name)
    assert torch.equal(bits_of(alone)[0], bits_of(one)[431])
    assert torch.equal(alone.scales[0], one.scales[431])
    experts = quantize(weight.view(7, 100, 1100), name)
    assert torch.equal(bits_of(experts).view(700, 1100), bits_of(one))


# Which weights ------------------------------------------------------------------------------------------------------

ROLES: tuple[Role, ...] = ("attention", "mlp", "experts", "head", "mamba", "other")


def test_the_policy_leaves_mixers_and_small_matrices_alone() -> None:
    usual = QuantizationPolicy("int4")
    assert [role for role in ROLES if usual.quantization_of(role)] == ["attention", "mlp", "experts", "head"]
    with_mamba = QuantizationPolicy("int8", mamba=True)
    assert [role for role in ROLES if with_mamba.quantization_of(role) == "int8"] == list(ROLES[:-1])
    assert not any(map(UNQUANTIZED.quantization_of, ROLES))


def test_quantize_mamba_needs_a_format() -> None:
    assert QuantizationPolicy.of(EngineConfig(model="m", quantization="int4")) == QuantizationPolicy("int4")
    with pytest.raises(ConfigError, match="quantize_mamba needs quantization, one of int8, int4, int4-g32, fp8"):
        QuantizationPolicy.of(EngineConfig(model="m", quantize_mamba=True))


class Recorder:
    """An op that packs as its inner op does, and records the weights that it was given."""

    def __init__(self, inner: Any, packed: list[Raw]) -> None:
        self.inner, self.packed = inner, packed

    def pack(self, *weights: Raw) -> Any:
        self.packed += weights
        return self.inner.pack(*weights)

    def __call__(self, *arguments: Any) -> Tensor:
        return self.inner(*arguments)


def recording() -> tuple[Kernels, list[Raw]]:
    kernels, packed = select("cpu", REFERENCE), list[Raw]()
    ops: dict[str, Any] = {name: Recorder(getattr(kernels, name), packed) for name in REFERENCE}
    return replace(kernels, **ops), packed


def load(
    folder: Path, policy: QuantizationPolicy, kernels: Kernels | None = None, dtype: torch.dtype = torch.float32
) -> Model:
    model = build_model(load_model_config(folder), kernels or select("cpu", {}), dtype=dtype, device=CPU, policy=policy)
    load_weights(model, folder, lambda phase, fraction: None)
    return model


def shape_of(weight: Raw) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.values.shape)


def size_of(weight: Raw) -> float:
    """Returns the size of a weight in bytes, if two 4-bit numbers share a byte."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    return weight.values.numel() * weight.bits / 8 + weight.scales.nbytes


@pytest.mark.parametrize("mamba", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantised_and_what_it_weighs(name: Quantization, mamba: bool, tmp_path: Path) -> None:
    """Mamba, Mamba, attention, Mamba, of which the second and the last have experts."""
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    (kernels, packed), policy = recording(), QuantizationPolicy(name, mamba)
    config = load(tmp_path, policy, kernels, torch.bfloat16).config
    quantised = [weight for weight in packed if isinstance(weight, QuantizedWeight)]
    plain = [weight for weight in packed if isinstance(weight, Tensor)]
    mixers, small = [(16, 32), (64, 16)] * 3, [(4, 16)] * 2 + [(9, 32), (32, 1)] * 3
    feed_forward = [(48, 16), (16, 24)] * 2 + [(4, 48, 16), (4, 16, 24)] * 2
    others = [(32, 16), (16, 16), *feed_forward, (48, 16)]  # q, k and v; out; the head, tied
    assert sorted(map(shape_of, quantised)) == sorted(others + (mixers if mamba else []))
    assert sorted(map(shape_of, plain)) == sorted(small + ([] if mamba else mixers))
    assert {weight.bits for weight in quantised} == {FORMATS[name].bits}
    # norms, convolutions, A, D, the dt bias, and the embedding, which a tied head leaves as it is
    unpacked = config.num_parameters() - sum(math.prod(shape_of(weight)) for weight in packed) + 48 * 16
    in_float32 = 3 * 32 * (4 + 2)
    total = sum(map(size_of, packed)) + 2 * unpacked + 2 * in_float32
    assert weight_bytes(config, 2, policy=policy) == total
    experts = sum(size_of(weight) for weight in packed if len(shape_of(weight)) == 3)
    read = total - 2 * 48 * 16  # of the embedding a step reads a row
    assert step_bytes(config, 2, policy=policy) == read - experts / 2, "one token reads two of four"
    assert step_bytes(config, 2, policy=policy, num_sequences=2) == read - experts / 4


def test_bytes_of_the_published_shapes(tmp_path: Path) -> None:
    config = load_model_config(write_geometry(tmp_path, "3b"))
    assert weight_bytes(config, 2) == step_bytes(config, 2), "a tied head is the embedding"
    attention, mlp, head = 2 * 2560 * (2560 + 128), 28 * 3 * 2560 * 8192, 65536 * 2560
    attention *= 2
    rows = 2 * (2560 + 2 * 128 + 2560) + 28 * (2 * 8192 + 2560) + 65536
    saved = attention + mlp + head - 4 * rows
    assert step_bytes(config, 2) - step_bytes(config, 2, policy=QuantizationPolicy("int8")) == saved
    mixers, mixer_groups = 26 * 3 * 2560 * 5120, 26 * (2 * 5120 * 20 + 2560 * 40)
    default, with_mamba = (weight_bytes(config, 2, policy=QuantizationPolicy("int4", mamba)) for mamba in (False, True))
    assert default - with_mamba == mixers * 3 // 2 - 4 * mixer_groups


# The model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_model_is_the_model_of_the_rounded_weights(name: Quantization, tmp_path: Path) -> None:
    """In float32, so that only the weights are rounded; a checkpoint of what they stand for is the oracle."""
    policy, config = QuantizationPolicy(name, mamba=True), {"hidden_size": 160, "intermediate_size": 200}
    write_checkpoint(tmp_path, torch.float32, **config)
    quantised, plain = logits(load(tmp_path, policy)), logits(load(tmp_path, UNQUANTIZED))

    def rounded(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            if key.split(".")[-2] in PRODUCTS:
                tensor.copy_(torch.from_numpy(exact(quantize(tensor, name))))

    rewrite(tmp_path, rounded)
    expected = logits(load(tmp_path, UNQUANTIZED))
    torch.testing.assert_close(quantised, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-2, "rounding must have changed something"


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_the_files_gives_the_same_quantised_model(name: Quantization, tmp_path: Path) -> None:
    policy = QuantizationPolicy(name)
    write_checkpoint(tmp_path)
    expected = logits(load(tmp_path, policy))
    rewrite(tmp_path, fuse)
    assert torch.equal(logits(load(tmp_path, policy)), expected)
    names = sorted(tensors_of(tmp_path))
    shard(tmp_path, (names[::2], names[1::2]))  # every layer is under way when the first file ends
    assert torch.equal(logits(load(tmp_path, policy)), expected)


@pytest.mark.parametrize("random", [False, True])
def test_raw_weights_are_let_go_before_the_quantised_ones_are_packed(random: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    raw: dict[int, weakref.ref[Tensor]] = {}
    left: list[int] = []

    class Watched(Recorder):
        def pack(self, *weights: Raw) -> Any:
            if isinstance(weights[0], QuantizedWeight):
                left.append(sum(ref() is not None for ref in raw.values()) + sum(map(len, [*packed, weights])))
                packed.append(weights)
            return self.inner.pack(*weights)

    kernels, packed = select("cpu", REFERENCE), list[tuple[Raw, ...]]()
    ops: dict[str, Any] = {name: Watched(getattr(kernels, name), []) for name in REFERENCE}
    policy = QuantizationPolicy("int8", mamba=True)
    model = build_model(
        load_model_config(tmp_path), replace(kernels, **ops), dtype=torch.bfloat16, device=CPU, policy=policy
    )
    for name, destination in model.tensor_map().destinations.items():
        data = destination.tensor
        if name.split(".")[-2] in PRODUCTS:
            assert data._base is not None, "a view of the raw weight"
            raw[id(data._base)] = weakref.ref(data._base)
        del data, destination
    matrices = 3 * 2 + 2 + 2 * 2 + 2 * 2 + 1  # mixers, attention, dense, experts, head
    assert len(raw) == matrices
    if random:
        dummy_weights(model, seed=0)
    else:
        load_weights(model, tmp_path, lambda phase, fraction: None)
    assert len(left) == matrices - 2, "the experts' two matrices are packed together"
    assert set(left) == {matrices}, "as many raw ones have gone as have been packed, this one included"


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, tuple) else []


def test_dummy_experts_are_drawn_and_quantised_on_the_device(tmp_path: Path) -> None:
    """The memory on the host stays as it is. Here "cpu:0" is the device, which differs from the host's "cpu"."""
    write_checkpoint(tmp_path)
    config, policy = load_model_config(tmp_path), QuantizationPolicy("int8")
    kernels = select("cpu", {"all": "reference"})
    models: list[Any] = []
    for elsewhere in (False, True):
        model: Any = build_model(config, kernels, dtype=torch.bfloat16, device=CPU, policy=policy)
        tensor_map = model.tensor_map()
        for unit in tensor_map.units:
            far = elsewhere and any(".experts." in name for name in unit.destinations)
            for destination in unit.destinations.values() if far else ():
                destination.tensor.fill_(7.0)
            pack = fill_unit(unit, 3, torch.device("cpu:0") if far else CPU, tensor_map.drawn)
            if far:
                assert all(bool((destination.tensor == 7).all()) for destination in unit.destinations.values())
                assert len(tensor_map.drawn) == 2, "gate and up of all experts share one, down has the other"
            pack()
            assert tensor_map.drawn == {}
        models.append(model)
    plain, drawn = (
        [tensors_in(*getattr(layer._feed_forward, "_experts", [()])) for layer in m._layers] for m in models
    )
    assert sum(map(len, plain)) > 0
    assert all(
        torch.equal(a, b) for one, other in zip(plain, drawn, strict=True) for a, b in zip(one, other, strict=True)
    )


# Quality ------------------------------------------------------------------------------------------------------------

STORY = """\
Once upon a time there was a little girl named Mia. She had a red ball and a small brown dog. Every day they
played in the park near the big tree. One day the ball rolled into the pond. Mia was sad because she could not
swim. The dog saw that she was sad, so he jumped into the water and brought the ball back. Mia laughed and
gave him a big hug. "You are the best dog in the world," she said. Then they went home, and her mother made
them a warm dinner. After dinner Mia put the ball in a box under her bed, so that it would never get lost
again. The dog lay down beside her and fell asleep.
"""


@pytest.fixture(scope="module")
def plain_loss() -> float:
    return loss(None)


def loss(quantization: Quantization | None, **settings: Any) -> float:
    """Returns the loss in nats per token of the demonstration model on a story that it has not seen."""
    llm = LLM(demo_folder(), quantization=quantization, threads=1, max_num_seqs=1, **settings)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    [completion] = llm.generate([" ".join(STORY.split())], params)
    scores = [entry.logprob for entry in completion.prompt_logprobs if entry]
    assert len(scores) > 100
    return -sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("name", "mamba", "limit"),
    [("int8", False, 0.005), ("int8", True, 0.005), ("int4", False, 0.04), ("fp8", True, 0.01)],
)
def test_the_loss_of_the_demonstration_hardly_grows(
    name: Quantization, mamba: bool, limit: float, plain_loss: float
) -> None:
    assert 1 < plain_loss < 4
    change = loss(name, quantize_mamba=mamba) / plain_loss - 1
    assert 0 != abs(change) < limit
