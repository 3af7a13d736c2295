"""Writes GGUF files with the package `gguf`, from the tiny checkpoints of the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]

# Where the half-precision numbers of a block are, in bytes, for the types that the package cannot write.
HALVES: Mapping[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
# The largest product of a scale of six or eight bits with a value, which a random block's halves divide by.
LARGEST: Mapping[str, float] = {
    "Q2_K": 45,
    "Q3_K": 128,
    "Q4_K": 945,
    "Q5_K": 1953,
    "Q6_K": 4096,
    "IQ4_NL": 127,
    "IQ4_XS": 4064,
}


def random_blocks(kind: str, rows: int, inputs: int, size: float, rng: np.random.Generator) -> Array:
    """Random blocks of a type, whose numbers are at most about `size`: uint8 [rows, bytes of a row]."""
    per_block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * inputs // per_block, num_bytes), dtype=np.uint8)
    for offset in HALVES[kind]:
        halves = (size / LARGEST[kind] * rng.uniform(0.5, 1, len(blocks))).astype(np.float16)
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def encoded(weight: Array, kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """A weight [..., K] as bytes of the type, and the numbers that these bytes stand for."""
    number = GGMLQuantizationType[kind]
    if kind in HALVES:
        rows, inputs = weight.size // weight.shape[-1], weight.shape[-1]
        data = random_blocks(kind, rows, inputs, 2 * float(weight.std()), rng).reshape(*weight.shape[:-1], -1)
    else:
        data = quantize(weight, number)
    return data, dequantize(data, number).reshape(weight.shape)


def metadata_of(config: Mapping[str, Any], attention: list[int]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    experts = config["num_experts"]
    return {
        "jamba.block_count": config["num_hidden_layers"],
        "jamba.context_length": config["max_position_embeddings"],
        "jamba.embedding_length": config["hidden_size"],
        "jamba.feed_forward_length": config["intermediate_size"],
        "jamba.attention.head_count": config["num_attention_heads"],
        "jamba.attention.head_count_kv": [config["num_key_value_heads"] if i in attention else 0 for i in layers],
        "jamba.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "jamba.ssm.conv_kernel": config["mamba_d_conv"],
        "jamba.ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "jamba.ssm.state_size": config["mamba_d_state"],
        "jamba.ssm.time_step_rank": config["mamba_dt_rank"],
        "jamba.expert_count": experts if experts > 1 else 0,
        "jamba.expert_used_count": config["num_experts_per_tok"] if experts > 1 else 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_ff_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.x_proj.weight": "ssm_x.weight",
    "mamba.dt_proj.weight": "ssm_dt.weight",
    "mamba.dt_proj.bias": "ssm_dt.bias",
    "mamba.dt_layernorm.weight": "ssm_dt_norm.weight",
    "mamba.b_layernorm.weight": "ssm_b_norm.weight",
    "mamba.c_layernorm.weight": "ssm_c_norm.weight",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.out_proj.weight": "ssm_out.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
}


def gguf_tensors(tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors of a Hugging Face checkpoint as llama.cpp's converter stores them."""
    renamed: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name in sorted(tensors):
        parts, value = name.split("."), tensors[name].astype(np.float32)
        if parts[1] != "layers":
            fixed = {"embed_tokens": "token_embd", "final_layernorm": "output_norm", "weight": "output"}
            renamed[f"{fixed[parts[1]]}.weight"] = value
        elif "experts" in parts:
            experts.setdefault(f"blk.{parts[2]}.ffn_{parts[6].removesuffix('_proj')}_exps.weight", []).append(value)
        else:
            own = ".".join(parts[3:])
            value = -np.exp(value) if own == "mamba.A_log" else value.squeeze(1) if "conv1d.w" in own else value
            renamed[f"blk.{parts[2]}.{NAMES[own]}"] = value
    return renamed | {name: np.stack(values) for name, values in experts.items()}


def write_gguf(
    path: Path,
    folder: Path,
    kind_of: Callable[[str], str] = lambda name: "F32",
    *,
    vocabulary: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint in `folder` to a GGUF file and replaces its weights by the numbers that the file stands
    for. `kind_of` maps the name of a matrix to its type. `changes` are changes of the metadata; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    rng, exact = np.random.default_rng(0), dict[str, Array]()
    attention = sorted({int(name.split(".")[2]) for name in stored if ".self_attn." in name})
    metadata = metadata_of(config, attention) | dict(vocabulary or {}) | dict(changes or {})
    writer = GGUFWriter(path, metadata.pop("general.architecture", "jamba"))
    for key, value in metadata.items():
        add(writer, key, value)
    for name, weight in gguf_tensors(stored).items():
        matrix = weight.ndim > 1 and not name.endswith(("conv1d.weight", "ssm_a", "ffn_gate_inp.weight"))
        kind = kind_of(name) if matrix else "F32"
        data, exact[name] = encoded(weight, kind, rng)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(hugging_face_tensors(exact, stored), folder / "model.safetensors")
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def hugging_face_tensors(exact: Mapping[str, Array], stored: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of a GGUF file under the names that `stored` has."""
    result: dict[str, Array] = {}
    positions: dict[str, int] = {}
    for name in sorted(stored):
        [own] = gguf_tensors({name: stored[name]})
        value = exact[own]
        if "_exps" in own:
            value = value[positions.get(own, 0)]
            positions[own] = positions.get(own, 0) + 1
        if own.endswith("ssm_a"):
            value = np.log(-value)
        result[name] = np.ascontiguousarray(value.reshape(stored[name].shape))
    return result
