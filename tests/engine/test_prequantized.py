"""Folders that other tools have quantised: the engine's log-probabilities equal those of transformers on the same
numbers in float32. The folders are written by `tests/quantized_folders.py` from the documented layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jamba_server.engine.convert.to_folder import convert_to_folder
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.contents import read_model, read_plan
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_files import INDEX_FILE
from jamba_server.engine.weight_sizes import kept_formats, weight_bytes
from jamba_server.llm import LLM
from tests import quantized_folders as written
from tests.quantized_folders import Array, Written
from tests.tiny import oracle_logits, save_tiny

PROMPT = list(range(3, 40))
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_dt_rank": 8,
}
DENSE = SHAPE | {"num_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True}


def scheme(pack: bool, bits: int, size: int | None, symmetric: bool, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "symmetric": symmetric,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if pack else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights} | more},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes"}
ACTIVATIONS = {"input_activations": {"num_bits": 8, "dynamic": True}}
CASES: dict[str, tuple[dict[str, Any], Callable[[Array], Written]]] = {
    "gptq": (GPTQ, lambda w: written.gptq(w, bits=4, size=32)),
    "gptq rows": (GPTQ | {"group_size": -1}, lambda w: written.gptq(w, bits=4, size=None)),
    "gptq_v2, 8 bits": (
        GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"},
        lambda w: written.gptq(w, bits=8, size=32, v2=True),
    ),
    "gptq desc_act": (
        GPTQ | {"desc_act": True},
        lambda w: written.gptq(w, bits=4, size=32, order=np.random.default_rng(0).permutation(w.shape[1]) // 32),
    ),
    "awq": (AWQ, lambda w: written.awq(w, size=32)),
    "packed int4": (
        scheme(True, 4, 32, True),
        lambda w: written.compressed(w, bits=4, size=32, symmetric=True, pack=True),
    ),
    "packed int4 with zeros": (
        scheme(True, 4, 32, False),
        lambda w: written.compressed(w, bits=4, size=32, symmetric=False, pack=True),
    ),
    "packed int8 rows": (
        scheme(True, 8, None, True),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=True, pack=True),
    ),
    "int8": (
        scheme(False, 8, None, True, **ACTIVATIONS),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=True, pack=False),
    ),
    "int8 with zeros": (
        scheme(False, 8, None, False),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=False, pack=False),
    ),
    "rows of 8 bits": (BNB | {"load_in_8bit": True}, written.rows8),
    "nf4": (BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, written.nf4),
    "nf4 nested": (
        BNB | {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        lambda w: written.nf4(w, nested=True),
    ),
    "nf4 across rows": (BNB | {"load_in_4bit": True}, lambda w: written.nf4(w, block=128)),
}


def is_quantized(module: str, weight: Array) -> bool:
    """Only some modules are quantised, and in one layer only some of a kind."""
    kept = ("embed_tokens", "lm_head", "dt_proj", "router", "x_proj", "layers.1.self_attn.k_proj", "norm")
    return not any(name in module for name in kept)


def write(name: str, folder: Path, shape: dict[str, Any]) -> Path:
    save_tiny(folder, **shape)
    settings, writer = CASES[name]
    return written.rewrite(
        folder, folder / "quantised", settings, lambda module, w: writer(w) if is_quantized(module, w) else None
    )


def largest_difference(folder: Path, **options: Any) -> float:
    """Of all log-probabilities of a prompt's tokens, from those of transformers on the same numbers in float32."""
    model = transformers.JambaForCausalLM.from_pretrained(folder / "plain").eval()
    expected = oracle_logits(model, PROMPT).log_softmax(-1)
    llm = LLM(folder, **{"dtype": "float32", "max_num_seqs": 2, "threads": 1} | options)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=0)
    entries = llm.generate([PROMPT], params)[0].prompt_logprobs
    pairs = [(entry.logprob, expected[i - 1, PROMPT[i]].item()) for i, entry in enumerate(entries) if entry is not None]
    assert len(pairs) == len(PROMPT) - 1
    return max(abs(a - b) for a, b in pairs)


# Each case runs on one of two models, one of which has experts.
MODELS = {name: (SHAPE, DENSE)[i % 2] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path, MODELS[name])
    config = load_model_config(folder)
    assert "model.layers.0.mamba.in_proj.weight" in config.stored
    assert "model.layers.1.self_attn.k_proj.weight" not in config.stored
    assert largest_difference(folder) < 1e-3
    notes = " ".join(read_model(folder).warnings)
    assert ("rounding of activations to 8 bits is not followed" in notes) == (name in ("rows of 8 bits", "int8"))
    # Most matrices stay as they are in the files.
    kept = kept_formats(config)
    assert (len(kept) == len(config.stored)) == (name not in ("gptq desc_act", "nf4 across rows"))


@pytest.mark.parametrize(("shape", "bits"), [(SHAPE, 4), (DENSE, 8)], ids=["experts", "dense"])
def test_the_layout_of_mlx(shape: dict[str, Any], bits: int, tmp_path: Path) -> None:
    folder = write_for_mlx(tmp_path, shape, bits)
    assert set(load_model_config(folder).stored) >= {"model.embed_tokens.weight", "model.layers.0.mamba.x_proj.weight"}
    assert largest_difference(folder) < 1e-3


def write_for_mlx(tmp_path: Path, shape: dict[str, Any], bits: int) -> Path:
    save_tiny(tmp_path, **shape)
    settings: dict[str, Any] = {"group_size": 64, "bits": bits, "mode": "affine"}
    tensors: dict[str, Array] = {}
    plain = load_file(tmp_path / "model.safetensors")
    for module, weight in stacked_for_mlx(plain).items():
        size = 32 if module.endswith("q_proj") else 64
        own = 8 if module.endswith("router") else bits
        if module.endswith(".conv1d"):
            tensors[f"{module}.weight"] = weight.swapaxes(1, 2)
        elif weight.shape[-1] % size or module.endswith("o_proj"):  # mlx-lm leaves such rows as they are
            tensors[f"{module}.weight"] = weight
        else:
            result = written.mlx(weight, bits=own, size=size)
            tensors |= {f"{module}.{end}": part for end, part in result.tensors.items()}
            plain |= unstacked(module, result.numbers)
            settings[module] = {"group_size": size, "bits": own}
    tensors |= {name: plain[name] for name in plain if not name.endswith(".weight") or plain[name].ndim == 1}
    return written.save(tmp_path / "mlx", tmp_path / "config.json", tensors, plain, "quantization", settings)


def stacked_for_mlx(tensors: dict[str, Array]) -> dict[str, Array]:
    """The weights of modules with two or more dimensions. Those of all experts of a layer become one."""
    weights: dict[str, Array] = {}
    for name, tensor in tensors.items():
        layer, is_expert, rest = name.removesuffix(".weight").partition(".experts.")
        if not name.endswith(".weight") or tensor.ndim == 1:
            continue
        if is_expert:
            module = f"{layer}.switch_mlp.{rest.partition('.')[2]}"
            count = sum(other.startswith(f"{layer}.experts.") for other in tensors) // 3
            own = [tensors[f"{layer}.experts.{e}.{rest.partition('.')[2]}.weight"] for e in range(count)]
            weights[module] = np.stack(own)
        else:
            weights[name.removesuffix(".weight")] = tensor
    return weights


def unstacked(module: str, numbers: Array) -> dict[str, Array]:
    layer, is_stacked, projection = module.partition(".switch_mlp.")
    if not is_stacked:
        return {f"{module}.weight": numbers}
    return {f"{layer}.experts.{e}.{projection}.weight": numbers[e] for e in range(len(numbers))}


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Old versions of AutoGPTQ and AutoAWQ wrote their settings beside config.json."""
    folder = write("gptq", tmp_path, DENSE)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    del settings["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert largest_difference(folder) < 1e-3
    (folder / "quantize_config.json").write_text(json.dumps(settings | {"bits": 2}))
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: bits is 2; this server reads 4, 8 only"):
        load_model_config(folder)


@pytest.mark.parametrize("name", ["gptq", "mlx"])
def test_a_conversion_to_int8(name: str, tmp_path: Path) -> None:
    folder = write_for_mlx(tmp_path, SHAPE, 4) if name == "mlx" else write(name, tmp_path, SHAPE)
    convert_to_folder(folder, tmp_path / "int8", "int8")
    convert_to_folder(folder / "plain", tmp_path / "plain", "int8")
    ours, theirs = (load_file(path / "model-00001.safetensors") for path in (tmp_path / "int8", tmp_path / "plain"))
    assert ours.keys() == theirs.keys()
    for key, numbers in ours.items():
        np.testing.assert_allclose(numbers, theirs[key], rtol=1e-6, atol=1 if numbers.dtype == np.int8 else 1e-6)
    assert load_model_config(tmp_path / "int8").stored_format == "int8"


PLANNED = ["gptq", "awq", "packed int4 with zeros", "int8", "rows of 8 bits", "nf4", "mlx"]


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_needs_no_weight_files(name: str, has_index: bool, tmp_path: Path) -> None:
    """With the index, the plan without weight files differs only by the dtype of the scales."""
    folder = write_for_mlx(tmp_path, SHAPE, 4) if name == "mlx" else write(name, tmp_path, SHAPE)
    real = read_plan(folder)
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    if has_index:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, "absent.safetensors")}))
    planned = read_plan(folder)
    assert any("weight files are not here" in warning for warning in planned.warnings)
    if has_index:
        assert planned.config.stored.keys() == real.config.stored.keys()
    sizes = [
        weight_bytes(config, 2, policy=QuantizationPolicy(blocks=kept_formats(config)))
        for config in (real.config, planned.config)
    ]
    assert 0.7 < sizes[1] / sizes[0] < 1.2
