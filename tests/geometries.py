"""The published Jamba geometries as config.json, without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COMMON: Mapping[str, Any] = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 65536,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
}
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "mini": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "large": {
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 72,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "3b": {
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 1,
        "attn_layer_period": 14,
        "attn_layer_offset": 7,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "tiny-dev": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 8,
    },
}


def write_geometry(folder: Path, name: str) -> Path:
    """A checkpoint folder that has nothing but its config.json."""
    (folder / "config.json").write_text(json.dumps({**_COMMON, **GEOMETRIES[name]}))
    return folder
