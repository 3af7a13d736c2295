"""What a checkpoint's configuration becomes, and which ones are refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.weight_sizes import weight_bytes

MINI: dict[str, Any] = {
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "bos_token_id": 1,
    "eos_token_id": [2, 518],
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "model_type": "jamba",
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "mamba_dt_rank": 512,
}
SMALL_3B = {
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 14,
    "attn_layer_offset": 7,
    "mamba_dt_rank": 160,
    "tie_word_embeddings": True,
}
TINY_DEV = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "mamba_dt_rank": "auto",
}
ABSENT = object()


def load(folder: Path, generation: object = ABSENT, **changes: object) -> JambaConfig:
    values = {key: value for key, value in {**MINI, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not ABSENT:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder)


def test_mini(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.architecture == "JambaForCausalLM"
    assert config.dtype == "bfloat16"
    assert (config.head_dim, config.d_inner, config.mamba_dt_rank) == (128, 8192, 256)
    assert config.attention_layers == (4, 12, 20, 28)
    assert config.mamba_layers == tuple(i for i in range(32) if i not in (4, 12, 20, 28))
    assert [i for i in range(32) if config.is_moe(i)] == list(range(1, 32, 2))
    assert config.eos_token_ids == (2, 518)
    assert (config.bos_token_id, config.pad_token_id) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 51_570_323_328),
        (LARGE, 398_555_145_696),
        (SMALL_3B, 3_029_337_472),
        (TINY_DEV, 318_688_640),
    ],
    ids=["mini", "large", "3b", "tiny-dev"],
)
def test_published_sizes(changes: dict[str, Any], expected: int, tmp_path: Path) -> None:
    assert load(tmp_path, **changes).num_parameters() == expected


def test_weight_bytes_are_the_files_size_and_what_float32_adds(tmp_path: Path) -> None:
    config = load(tmp_path)
    published = 103_140_646_656  # total_size in the index of Jamba 1.5 Mini
    in_float32 = 28 * 8192 * (16 + 1 + 1)  # A_log, D and dt bias of 28 Mamba layers
    assert weight_bytes(config, 2) == published + 2 * in_float32
    assert weight_bytes(config, 4) == 2 * published


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    named = ("architectures", "model_type", "torch_dtype", "eos_token_id", *required)
    assert load(tmp_path, **{key: ABSENT for key in MINI if key not in named}) == load(tmp_path)


def test_one_expert_is_dense_whatever_top_k_says(tmp_path: Path) -> None:
    config = load(tmp_path, num_experts=1, num_experts_per_tok=2)
    assert not any(config.is_moe(i) for i in range(32))


def test_dt_rank_auto_rounds_up(tmp_path: Path) -> None:
    assert load(tmp_path, mamba_dt_rank="auto", hidden_size=40, num_attention_heads=4, num_key_value_heads=4)
    assert load_model_config(tmp_path).mamba_dt_rank == 3


def test_kv_heads_null_is_multi_head_attention(tmp_path: Path) -> None:
    assert load(tmp_path, num_key_value_heads=None).num_key_value_heads == 32


def test_head_dim_may_be_given(tmp_path: Path) -> None:
    assert load(tmp_path, head_dim=96, num_attention_heads=24, hidden_size=1000).head_dim == 96


def test_remote_code_configurations_name_the_context_n_ctx(tmp_path: Path) -> None:
    config = load(tmp_path, max_position_embeddings=ABSENT, n_ctx=4096, mamba_inner_layernorms=True)
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, ABSENT, (2,)),
        ([2, 518], ABSENT, (2, 518)),
        (2, {"eos_token_id": [2, 519]}, (2, 519)),
        ([2, 518], {"eos_token_id": 7}, (7,)),
        ([2, 2, 518], {"temperature": 0.6}, (2, 518)),
        ([2, 518], {"eos_token_id": None}, (2, 518)),
        (None, ABSENT, ()),
        (ABSENT, ABSENT, (2,)),
        (0, ABSENT, (0,)),
    ],
)
def test_eos_token_ids(config: object, generation: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert load(tmp_path, generation, eos_token_id=config).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": ABSENT, "dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": ABSENT}, "float32"),
    ],
)
def test_dtype(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert load(tmp_path, **changes).dtype == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"num_labels": 5}, 5),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
    ],
)
def test_labels(changes: dict[str, Any], expected: int, tmp_path: Path) -> None:
    config = load(tmp_path, architectures=["JambaForSequenceClassification"], **changes)
    assert config.is_classifier
    assert config.num_labels == expected
    assert config.num_parameters() == 51_570_323_328 - (65_536 - expected) * 4096


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, 'model_type is "llama"; this server runs "jamba" models'),
        ({"model_type": ABSENT}, "model_type is missing"),
        ({"architectures": ["JambaModel"]}, 'architectures is ["JambaModel"]; one of JambaForCausalLM'),
        ({"architectures": ABSENT}, "architectures is missing; one of JambaForCausalLM"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; this server implements only "silu"'),
        ({"sliding_window": 4096}, "sliding_window is 4096; this server implements only null"),
        ({"quantization_config": 8}, "quantization_config is 8; an object is expected"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 1024 is expected"),
        ({"num_experts": 1025}, "num_experts is 1025; at most 1024 is expected"),
        ({"hidden_size": 10**4000}, "...; at most 1048576 is expected"),
        ({"vocab_size": 1 << 25}, "vocab_size is 33554432; at most 16777216 is expected"),
        ({"max_position_embeddings": 1 << 40}, "; at most 1073741824 is expected"),
        ({"rms_norm_eps": 10**400}, "...; a number above 0 and at most 1 is expected"),
        ({"attention_bias": True}, "attention_bias is true; this server implements only false"),
        ({"rope_scaling": {"factor": 2.0}}, 'rope_scaling is {"factor": 2.0}; this'),
        ({"mamba_inner_layernorms": False}, "mamba_inner_layernorms is false; this server implements only true"),
        ({"hidden_size": ABSENT}, "hidden_size is missing; a whole number of at least 1 is expected"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0; a whole number"),
        ({"hidden_size": True}, "hidden_size is true; a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0; a whole number of at least 1"),
        ({"vocab_size": "65536"}, 'vocab_size is "65536"; a whole number'),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; a whole number of at least 1"),
        ({"num_attention_heads": 30}, "num_attention_heads is 30; it must divide hidden_size, 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5; it must divide num_attention_heads, 32"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17; there are 16 experts (num_experts)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; a whole number of at least 1"),
        ({"attn_layer_offset": 8}, "attn_layer_offset is 8; it must be below attn_layer_period, 8"),
        ({"attn_layer_offset": -1}, "attn_layer_offset is -1; a whole number of at least 0"),
        ({"attn_layer_period": 0}, "attn_layer_period is 0; a whole number of at least 1"),
        ({"expert_layer_offset": 2}, "expert_layer_offset is 2; it must be below expert_layer_period, 2"),
        ({"attn_layer_period": 1, "attn_layer_offset": 0}, "attn_layer_period is 1; attn_layer_offset 0 and"),
        ({"attn_layer_period": 64, "attn_layer_offset": 40}, "leave it no attention layer"),
        ({"mamba_dt_rank": "full"}, 'mamba_dt_rank is "full"; "auto" or a whole number'),
        ({"mamba_dt_rank": 0}, "mamba_dt_rank is 0; a whole number of at least 1"),
        ({"mamba_dt_rank": None}, "mamba_dt_rank is null; "),
        ({"mamba_d_conv": 1}, "mamba_d_conv is 1; a whole number of at least 2"),
        ({"mamba_conv_bias": "yes"}, 'mamba_conv_bias is "yes"; true or false is expected'),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; a number above 0 and at most 1 is expected"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"; a number above 0'),
        ({"torch_dtype": "float64"}, 'torch_dtype is "float64"; one of bfloat16, float16, float32'),
        ({"torch_dtype": ["float16"]}, 'torch_dtype is ["float16"]; one of'),
        ({"eos_token_id": 65536}, "eos_token_id is 65536; token ids from 0 to 65535 are expected"),
        ({"eos_token_id": [2, "518"]}, 'eos_token_id is [2, "518"]; token ids'),
        ({"bos_token_id": [1, 2]}, "bos_token_id is [1, 2]; one token id is expected"),
        ({"pad_token_id": -1}, "pad_token_id is -1; token ids from 0"),
        ({"id2label": {}}, "id2label is {}; an object from label numbers to names"),
    ],
)
def test_refusals_name_file_key_and_value(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path, **changes)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message


def test_generation_config_is_checked_as_well(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is \[70000\]; token ids from 0"):
        load(tmp_path, {"eos_token_id": [70000]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "config.json cannot be read as JSON: "),
        ('{"vocab_size": ', "config.json cannot be read as JSON: "),
        ("[1]", "config.json holds a JSON list; an object is expected."),
        (b"\xff\xfe\x00", "config.json cannot be read as JSON: "),
    ],
)
def test_broken_files(text: str | bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as refusal:
        load_model_config(tmp_path)
    assert words in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder or file .*nowhere\."):
        load_model_config(tmp_path / "nowhere")
