"""Translates the names of tensors in GGUF files to the names in Hugging Face checkpoints, and lists the tensors of a
layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from jamba_server.engine.errors import CheckpointError, shown

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
_GLOBAL: Final[Mapping[str, str]] = {
    EMBEDDING: "model.embed_tokens.weight",
    HEAD: "lm_head.weight",
    "output_norm.weight": "model.final_layernorm.weight",
}
_LAYER: Final[Mapping[str, str]] = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "pre_ff_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ssm_in.weight": "mamba.in_proj.weight",
    "ssm_conv1d.weight": "mamba.conv1d.weight",
    "ssm_conv1d.bias": "mamba.conv1d.bias",
    "ssm_x.weight": "mamba.x_proj.weight",
    "ssm_dt.weight": "mamba.dt_proj.weight",
    "ssm_dt.bias": "mamba.dt_proj.bias",
    "ssm_dt_norm.weight": "mamba.dt_layernorm.weight",
    "ssm_b_norm.weight": "mamba.b_layernorm.weight",
    "ssm_c_norm.weight": "mamba.c_layernorm.weight",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_out.weight": "mamba.out_proj.weight",
    "ffn_gate.weight": "feed_forward.gate_proj.weight",
    "ffn_up.weight": "feed_forward.up_proj.weight",
    "ffn_down.weight": "feed_forward.down_proj.weight",
    "ffn_gate_inp.weight": "feed_forward.router.weight",
}
# These tensors [E, N, K] hold a projection of all experts of a layer. In a Hugging Face checkpoint each expert has
# a tensor of its own, whose number replaces "{}".
_EXPERTS: Final[Mapping[str, str]] = {
    "ffn_gate_exps.weight": "feed_forward.experts.{}.gate_proj.weight",
    "ffn_up_exps.weight": "feed_forward.experts.{}.up_proj.weight",
    "ffn_down_exps.weight": "feed_forward.experts.{}.down_proj.weight",
}
_HF_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HF_EXPERT: Final = re.compile(r"feed_forward\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_OF_LAYER: Final = re.compile(r"blk\.(\d{1,5})\.(.+)")


def in_layer(layer: int, name: str) -> str:
    return f"blk.{layer}.{name}"


def translated(name: str) -> str | None:
    """Returns the Hugging Face name of a tensor, or None if Jamba has no such tensor. The name of a tensor that holds
    all experts of a layer contains "{}" in the place of the expert's number."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    if (match := _OF_LAYER.fullmatch(name)) is None:
        return None
    rest = _LAYER.get(match[2]) or _EXPERTS.get(match[2])
    return None if rest is None else f"model.layers.{int(match[1])}.{rest}"


def stored_name(name: str) -> tuple[str, int | None]:
    """Returns the name that a tensor with the given Hugging Face name has in a GGUF file. The second result is the
    number of the expert to which the tensor belongs, or None."""
    for own, hugging_face in _GLOBAL.items():
        if hugging_face == name:
            return own, None
    match = _HF_LAYER.fullmatch(name)
    if match is not None and (expert := _HF_EXPERT.fullmatch(match[2])) is not None:
        return in_layer(int(match[1]), f"ffn_{expert[2]}_exps.weight"), int(expert[1])
    known = {hugging_face: own for own, hugging_face in _LAYER.items()}
    if match is None or match[2] not in known:
        raise CheckpointError(f"Tensor {shown(name)} has no place in a GGUF file of a Jamba model.")
    return in_layer(int(match[1]), known[match[2]]), None
