"""Jamba in numpy, float64, correct for every chunking: what transformers is not once a cache holds something.

Written from the papers (Gu & Dao 2023; Lieber et al. 2024) and the published tensor names, without a look at the
product. `golden_weights` are made from the tensors' names alone, so that the numbers in the tests can be had anywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jamba_server.engine.model_config import JambaConfig

Array = NDArray[np.float64]


@dataclass
class LayerState:
    """conv [W-1, D] and ssm [D, S] of a Mamba layer, k and v [tokens, G, Z] of an attention layer."""

    conv: Array
    ssm: Array
    k: Array
    v: Array


class NumpyJamba:
    """`weights` under their names on disk, one tensor an expert and projection."""

    def __init__(self, config: JambaConfig, weights: Mapping[str, Array]) -> None:
        self.config, self.weights = config, weights

    def new_state(self) -> list[LayerState]:
        c = self.config
        return [
            LayerState(
                conv=np.zeros((c.mamba_d_conv - 1, c.d_inner)),
                ssm=np.zeros((c.d_inner, c.mamba_d_state)),
                k=np.zeros((0, c.num_key_value_heads, c.head_dim)),
                v=np.zeros((0, c.num_key_value_heads, c.head_dim)),
            )
            for _ in range(c.num_hidden_layers)
        ]

    def forward(self, ids: Sequence[int], state: list[LayerState]) -> Array:
        """Returns the logits [T, V] of tokens that follow the tokens in `state`, and updates `state`."""
        x = self.weights["model.embed_tokens.weight"][list(ids)]
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}."
            y = self._norm(x, f"{layer}input_layernorm")
            attends = i % self.config.attn_layer_period == self.config.attn_layer_offset
            mixer, name = (self._attention, "self_attn.") if attends else (self._mamba, "mamba.")
            x = x + mixer(y, layer + name, state[i])
            y = self._norm(x, f"{layer}pre_ff_layernorm")
            routed = f"{layer}feed_forward.router.weight" in self.weights
            x = x + (self._moe if routed else self._mlp)(y, f"{layer}feed_forward.")
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self._linear(self._norm(x, "model.final_layernorm"), head)

    def _linear(self, x: Array, name: str) -> Array:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _norm(self, x: Array, name: str) -> Array:
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return self.weights[f"{name}.weight"] * (x / rms)

    def _mamba(self, x: Array, p: str, state: LayerState) -> Array:
        w, s, r = self.weights, self.config.mamba_d_state, self.config.mamba_dt_rank
        u, z = np.split(self._linear(x, f"{p}in_proj"), 2, axis=1)
        taps = w[f"{p}conv1d.weight"][:, 0, :].T
        inputs = np.concatenate([state.conv, u])
        state.conv = inputs[len(u) :].copy()
        u = sum((inputs[t : t + len(x)] * tap for t, tap in enumerate(taps)), w.get(f"{p}conv1d.bias", np.zeros(1)))
        u = _silu(np.asarray(u))
        dt, b, c = np.split(self._linear(u, f"{p}x_proj"), [r, r + s], axis=1)
        dt, b, c = (self._norm(y, f"{p}{name}_layernorm") for y, name in ((dt, "dt"), (b, "b"), (c, "c")))
        dt = np.logaddexp(0, self._linear(dt, f"{p}dt_proj"))
        a, d, y = -np.exp(w[f"{p}A_log"]), w[f"{p}D"], np.empty_like(u)
        for t in range(len(x)):
            state.ssm = np.exp(dt[t][:, None] * a) * state.ssm + (dt[t] * u[t])[:, None] * b[t]
            y[t] = state.ssm @ c[t] + d * u[t]
        return self._linear(y * _silu(z), f"{p}out_proj")

    def _attention(self, x: Array, p: str, state: LayerState) -> Array:
        size, groups = self.config.head_dim, self.config.num_attention_heads // self.config.num_key_value_heads
        q, k, v = (self._linear(x, f"{p}{name}_proj").reshape(len(x), -1, size) for name in "qkv")
        state.k, state.v = np.concatenate([state.k, k]), np.concatenate([state.v, v])
        keys, values = np.repeat(state.k, groups, axis=1), np.repeat(state.v, groups, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.sqrt(size)
        visible = np.tri(len(x), len(keys), len(keys) - len(x), dtype=bool)
        attention = _softmax(np.where(visible, scores, -np.inf))
        return self._linear(np.einsum("hqk,khd->qhd", attention, values).reshape(len(x), -1), f"{p}o_proj")

    def _mlp(self, x: Array, p: str) -> Array:
        return self._linear(_silu(self._linear(x, f"{p}gate_proj")) * self._linear(x, f"{p}up_proj"), f"{p}down_proj")

    def _moe(self, x: Array, p: str) -> Array:
        probabilities, y = _softmax(self._linear(x, f"{p}router")), np.zeros_like(x)
        for t, row in enumerate(probabilities):
            for e in np.argsort(-row, kind="stable")[: self.config.num_experts_per_tok]:
                y[t] += row[e] * self._mlp(x[t : t + 1], f"{p}experts.{e}.")[0]
        return y


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def tensor_shapes(config: JambaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a checkpoint with this configuration, by their names on disk."""
    h, v = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.final_layernorm.weight": (h,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, h)
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes |= {f"{p}input_layernorm.weight": (h,), f"{p}pre_ff_layernorm.weight": (h,)}
        attends = i % config.attn_layer_period == config.attn_layer_offset
        shapes |= _attention_shapes(config, f"{p}self_attn.") if attends else _mamba_shapes(config, f"{p}mamba.")
        routed = config.num_experts > 1 and i % config.expert_layer_period == config.expert_layer_offset
        shapes |= _moe_shapes(config, f"{p}feed_forward.") if routed else _mlp_shapes(config, f"{p}feed_forward.")
    return shapes


def _attention_shapes(config: JambaConfig, p: str) -> dict[str, tuple[int, ...]]:
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        f"{p}q_proj.weight": (q, h),
        f"{p}k_proj.weight": (kv, h),
        f"{p}v_proj.weight": (kv, h),
        f"{p}o_proj.weight": (h, q),
    }


def _mamba_shapes(config: JambaConfig, p: str) -> dict[str, tuple[int, ...]]:
    h, d, s, r = config.hidden_size, config.d_inner, config.mamba_d_state, config.mamba_dt_rank
    biases = {f"{p}conv1d.bias": (d,)} if config.mamba_conv_bias else {}
    biases |= {f"{p}in_proj.bias": (2 * d,), f"{p}out_proj.bias": (h,)} if config.mamba_proj_bias else {}
    return {
        f"{p}A_log": (d, s),
        f"{p}D": (d,),
        f"{p}conv1d.weight": (d, 1, config.mamba_d_conv),
        f"{p}in_proj.weight": (2 * d, h),
        f"{p}x_proj.weight": (r + 2 * s, d),
        f"{p}dt_proj.weight": (d, r),
        f"{p}dt_proj.bias": (d,),
        f"{p}out_proj.weight": (h, d),
        f"{p}dt_layernorm.weight": (r,),
        f"{p}b_layernorm.weight": (s,),
        f"{p}c_layernorm.weight": (s,),
        **biases,
    }


def _mlp_shapes(config: JambaConfig, p: str) -> dict[str, tuple[int, ...]]:
    h, f = config.hidden_size, config.intermediate_size
    return {f"{p}gate_proj.weight": (f, h), f"{p}up_proj.weight": (f, h), f"{p}down_proj.weight": (h, f)}


def _moe_shapes(config: JambaConfig, p: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{p}router.weight": (config.num_experts, config.hidden_size)}
    for e in range(config.num_experts):
        shapes |= _mlp_shapes(config, f"{p}experts.{e}.")
    return shapes


def golden_weights(config: JambaConfig) -> dict[str, Array]:
    """Returns a sine wave, rounded to float32, for each tensor. Its phase depends on the tensor's name."""
    return {name: _golden(name, shape) for name, shape in tensor_shapes(config).items()}


def _golden(name: str, shape: tuple[int, ...]) -> Array:
    wave = np.sin(0.7 * np.arange(np.prod(shape)) + zlib.crc32(name.encode()) % 1000 / 100).reshape(shape)
    rules: dict[str, Callable[[Array], Array]] = {
        "layernorm.weight": lambda w: 1 + 0.2 * w,
        "A_log": lambda w: np.log(np.arange(1, shape[-1] + 1)) + 0.1 * w,
        ".D": lambda w: 1 + 0.1 * w,
        "dt_proj.bias": lambda w: -2 + 0.5 * w,
        "embed_tokens.weight": lambda w: w,
    }
    rule = next((rule for ending, rule in rules.items() if name.endswith(ending)), lambda w: 0.4 * w)
    return rule(wave).astype(np.float32).astype(np.float64)
