"""Tiny random Jamba checkpoints, made and answered by transformers: the oracle of the model and of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()  # it says that the Mamba kernels are not installed
transformers.logging.disable_progress_bar()

_BASE: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "moe-gqa": {},
    "dense-mqa-tied": {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attn_layer_offset": 1,
        "eos_token_id": [2, 5],
    },
    "moe-mha-top1-odd-periods": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 0,
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
    },
    "conv3-state8-all-biases": {"mamba_d_conv": 3, "mamba_d_state": 8, "mamba_proj_bias": True},
    "expand3-no-biases-moe-everywhere": {
        "mamba_expand": 3,
        "mamba_conv_bias": False,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "tie_word_embeddings": True,
    },
    "conv2-dt-rank-auto": {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "mamba_dt_rank": "auto",
        "mamba_d_conv": 2,
        "mamba_d_state": 5,
    },
}


def save_tiny(folder: Path, *, seed: int = 0, architecture: str = "JambaForCausalLM", **overrides: Any) -> Any:
    """Saves a model of random float32 weights in `folder`, as transformers does, and returns it."""
    config = transformers.JambaConfig(**{**_BASE, **overrides})
    model: Any = getattr(transformers, architecture)(config).eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    return model


def oracle_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Returns transformers' logits of a prompt that is computed in one call: float32 [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@torch.no_grad()
def _randomize(model: Any, generator: torch.Generator) -> None:
    """Draws weights again, because transformers' own are so small that all logits are nearly equal."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        match name.split(".")[-1], name.split(".")[-2]:
            case "A_log", _:
                parameter.add_(0.1 * noise)
            case "D", _:
                parameter.copy_(1 + 0.1 * noise)
            case "bias", "dt_proj":
                parameter.copy_(0.5 * noise - 2)
            case "bias", _:
                parameter.copy_(0.2 * noise)
            case _, "embed_tokens":
                parameter.copy_(noise)
            case _, module if module.endswith("layernorm"):
                parameter.copy_(1 + 0.2 * noise)
            case _:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
