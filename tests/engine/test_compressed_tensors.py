"""Checkpoints whose weights are fp8 already, written here as llm-compressor writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import build_model
from jamba_server.engine.quantization import QuantizationPolicy, Role
from jamba_server.engine.start.weights import dummy_weights
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_sizes import weight_bytes
from jamba_server.kernels.ops import QuantizedWeight
from jamba_server.kernels.table import select
from jamba_server.llm import LLM
from tests.engine.test_quantization import CPU, load, recording
from tests.engine.test_weights import CONFIG, Tensors, logits, rewrite, set_tensor, write_checkpoint

GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "observer": "minmax",
    },
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    "output_activations": None,
}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head", "re:.*mamba.*", "re:.*router"],
}
ROLES: frozenset[Role] = frozenset(["attention", "mlp", "experts"])
PROJECTIONS = ("self_attn.", "feed_forward.")
Q, DOWN = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.feed_forward.experts.3.down_proj.weight"


def write_config(folder: Path, quantization: Any, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes, "quantization_config": quantization}))


def is_quantized(name: str) -> bool:
    return any(part in name for part in PROJECTIONS) and name.endswith("_proj.weight")


def to_fp8(tensors: Tensors) -> None:
    for name in filter(is_quantized, list(tensors)):
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        tensors[name] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale


def to_floats(tensors: Tensors) -> None:
    for name in filter(is_quantized, list(tensors)):
        tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale").float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    rewrite(tmp_path, to_fp8)
    write_config(tmp_path, QUANTIZATION)
    return tmp_path


def policy_of(folder: Path) -> QuantizationPolicy:
    return QuantizationPolicy("fp8", stored=load_model_config(folder).quantized_roles)


def shape_and_bits(values: Tensor) -> tuple[torch.Size, bytes]:
    return values.shape, values.view(torch.uint8).numpy().tobytes()


def test_weights_keep_their_bits(folder: Path) -> None:
    kernels, packed = recording()
    policy = policy_of(folder)
    assert policy.stored == ROLES
    load(folder, policy, kernels, torch.bfloat16)
    found = {shape_and_bits(weight.values) for weight in packed if isinstance(weight, QuantizedWeight)}
    tensors = dict[str, Tensor]()
    rewrite(folder, lambda on_disk: tensors.update(on_disk))

    def joined(*names: str) -> Tensor:
        return torch.cat([tensors[f"model.layers.{name}_proj.weight"] for name in names])

    expected = [joined("2.self_attn.q", "2.self_attn.k", "2.self_attn.v"), joined("2.self_attn.o")]
    for i in (0, 2):
        expected += [joined(f"{i}.feed_forward.gate", f"{i}.feed_forward.up"), joined(f"{i}.feed_forward.down")]
    for i in (1, 3):
        experts = [f"{i}.feed_forward.experts.{e}." for e in range(4)]
        expected.append(torch.stack([joined(f"{e}gate", f"{e}up") for e in experts]))
        expected.append(torch.stack([joined(f"{e}down") for e in experts]))
    assert found == set(map(shape_and_bits, expected))
    for weight in packed:
        if isinstance(weight, QuantizedWeight):
            assert (weight.bits, weight.group_size) == (8, weight.values.shape[-1])
            assert torch.equal(weight.scales, weight.scales.bfloat16().float()), "those of the file"


def test_the_model_is_that_of_the_weights_in_floats(folder: Path) -> None:
    """In float32, so that nothing is rounded."""
    quantized = logits(load(folder, policy_of(folder)))
    rewrite(folder, to_floats)
    write_config(folder, None)
    torch.testing.assert_close(quantized, logits(load(folder, QuantizationPolicy())), atol=1e-4, rtol=1e-4)


def test_it_is_served_without_a_flag(folder: Path) -> None:
    llm = LLM(folder, max_num_seqs=1, threads=1, dtype="bfloat16")
    assert (llm.core.info.quantization, llm.core.info.quantize_mamba) == ("fp8", False)
    config = load_model_config(folder)
    assert llm.core.info.weight_bytes == weight_bytes(config, 2, policy=policy_of(folder)) < weight_bytes(config, 2)
    [completion] = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(completion.token_ids) == 4
    with pytest.raises(ConfigError, match="quantization is 'int8', but the checkpoint's weights are fp8 already"):
        LLM(folder, quantization="int8")


@pytest.mark.parametrize("ignore", [QUANTIZATION["ignore"], ["re:.*(x|dt)_proj", "re:.*router"]])
def test_random_weights_take_its_place(ignore: list[str], tmp_path: Path) -> None:
    write_config(tmp_path, QUANTIZATION | {"ignore": ignore}, tie_word_embeddings=True)
    model = build_model(
        config := load_model_config(tmp_path),
        select("cpu", {}),
        dtype=torch.float32,
        device=CPU,
        policy=policy_of(tmp_path),
    )
    dummy_weights(model, seed=1)
    found = logits(model)
    assert found.isfinite().all()
    assert found.std() > 0.1
    assert ("mamba" in config.quantized_roles) == ("re:.*mamba.*" not in ignore)


@pytest.mark.parametrize(
    ("ignore", "changes", "roles"),
    [
        (["lm_head", "re:.*mamba", "re:.*router$", "re:.*self_attn.*"], {}, {"mlp", "experts"}),
        (["re:.*(x|dt)_proj", "re:.*router"], {}, {"attention", "mlp", "experts", "head", "mamba"}),
        (["re:.*(x|dt)_proj", "re:.*router"], {"tie_word_embeddings": True}, {"attention", "mlp", "experts", "mamba"}),
    ],
)
def test_roles(ignore: list[str], changes: dict[str, Any], roles: set[Role], tmp_path: Path) -> None:
    write_config(tmp_path, QUANTIZATION | {"ignore": ignore}, **changes)
    assert load_model_config(tmp_path).quantized_roles == roles


def test_targets_may_be_names(tmp_path: Path) -> None:
    group = GROUP | {"targets": ["re:.*experts.*"]}
    write_config(tmp_path, QUANTIZATION | {"config_groups": {"experts": group}, "ignore": []})
    assert load_model_config(tmp_path).quantized_roles == {"experts"}


def weights(**changes: Any) -> dict[str, Any]:
    return group(weights=GROUP["weights"] | changes)


def group(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": GROUP | changes}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "hqq"}, 'quant_method is "hqq"; this server reads compressed-tensors, gptq, awq'),
        ({"format": "nvfp4-pack-quantized"}, 'format is "nvfp4-pack-quantized"; this server reads "float-quantized"'),
        ({"format": "pack-quantized"}, 'weights.type is "float"; this server reads "int" only'),
        ({"kv_cache_scheme": {"num_bits": 8}}, 'kv_cache_scheme is {"num_bits": 8}; this server reads null'),
        ({"config_groups": None}, "config_groups is null; an object"),
        (weights(num_bits=4), "config_groups.group_0.weights.num_bits is 4; this server reads 8"),
        (weights(type="int"), 'weights.type is "int"; this server reads "float"'),
        (weights(strategy="tensor"), 'weights.strategy is "tensor"; this server reads "channel"'),
        (weights(strategy="block", block_structure=[128, 128]), 'weights.strategy is "block"'),
        (weights(group_size=128), "weights.group_size is 128; this server reads null"),
        (weights(symmetric=False), "weights.symmetric is false; this server reads true"),
        (weights(dynamic=True), "weights.dynamic is true; this server reads false"),
        (group(input_activations={"dynamic": False}), "input_activations.dynamic is false; this server reads true"),
        (group(output_activations={"num_bits": 8}), 'output_activations is {"num_bits": 8}; this server reads null'),
        (group(format="nvfp4-pack-quantized"), 'group_0.format is "nvfp4-pack-quantized"'),
        (group(targets=None), "group_0.targets is null; a list of names is expected"),
        ({"ignore": "lm_head"}, 'ignore is "lm_head"; a list of names'),
        ({"ignore": ["re:("]}, 'ignore is "re:("; it is not a regular expression'),
        ({"ignore": ["lm_head"]}, "ignore lacks model.layers.0.mamba.x_proj; this server supports no quantized"),
        (
            {"ignore": ["re:.*mamba", "re:.*router", "model.layers.0.feed_forward.up_proj"]},
            "ignore has model.layers.0.feed_forward.up_proj and not model.layers.0.feed_forward.gate_proj; in this "
            "server either all mlp weights are fp8 or none",
        ),
    ],
)
def test_refusals_name_file_key_and_value(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_config(tmp_path, QUANTIZATION | changes)
    with pytest.raises(CheckpointError) as refusal:
        load_model_config(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: quantization_config.")
    assert words in str(refusal.value)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def spoil(name: str, index: tuple[int, int]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8)[index] = 0x7F  # NaN

    return lambda folder: rewrite(folder, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{Q}_scale"), f"tensors are missing: {Q}_scale."),
        (set_tensor(Q, torch.ones(16, 16)), f"{Q} has dtype torch.float32; by quantization_config of"),
        (set_tensor(f"{Q}_scale", torch.ones(16)), f"{Q}_scale has shape [16]; "),
        (set_tensor(f"{Q}_scale", torch.full((16, 1), torch.inf)), f"{Q}_scale holds values that are infinite"),
        (spoil(DOWN, (15, 23)), f"{DOWN} holds values that are infinite or not a number (NaN)"),
        (set_tensor(f"{Q[:-7]}.input_scale", torch.ones(1)), "q_proj.input_scale [1] has no place in the model"),
    ],
)
def test_files_that_do_not_keep_their_word(change: Callable[[Path], None], words: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        load(folder, policy_of(folder))
    assert words in str(refusal.value)
