"""Computes how many bytes the weights of a model take, and which weights are kept in the format in which the checkpoint
stores them.

This module works without torch, so that the command `jamba plan` does not need torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.model_config import JambaConfig, scan_parameters
from jamba_server.engine.quantization import UNQUANTIZED, Format, QuantizationPolicy, Role
from jamba_server.engine.quantization.blocks import expert_names, shared_formats


def weight_bytes(config: JambaConfig, dtype_bytes: int, *, policy: QuantizationPolicy = UNQUANTIZED) -> int:
    """Returns the size of the loaded weights in bytes. Mamba's A, D and dt bias are in float32. If `policy` quantises a
    weight, the size of the weight includes its scales. Elements of weights that are neither quantised nor in float32
    take `dtype_bytes` bytes each. A quantised output head takes memory of its own even if it is tied to the embedding,
    which is never quantised.
    """
    scan = len(config.mamba_layers) * config.d_inner * scan_parameters(config)
    total = (config.num_parameters() - scan) * dtype_bytes + 4 * scan
    for matrix, one in _sizes(config, dtype_bytes, policy):
        size = matrix.count * one
        if matrix.role == "head" and config.tie_word_embeddings:
            total += size if policy.quantization_of("head") is not None else 0
        else:
            total += size - matrix.count * matrix.rows * matrix.inputs * dtype_bytes
    return total


def _sizes(config: JambaConfig, dtype_bytes: int, policy: QuantizationPolicy) -> Iterator[tuple[Matrix, int]]:
    """Yields the groups of weight matrices, and for each group the size of one matrix in bytes."""
    if not policy.blocks:
        for matrix in matrices(config):
            yield matrix, policy.num_bytes(matrix.role, matrix.rows, matrix.inputs, dtype_bytes=dtype_bytes)
        return
    for products in fused_products(config):
        formats = shared_formats(policy.blocks, [names for _, names in products])
        for i, (matrix, _) in enumerate(products):
            plain = matrix.rows * matrix.inputs * dtype_bytes
            yield matrix, plain if formats is None else formats[i].num_bytes(matrix.rows, matrix.inputs)


def step_bytes(
    config: JambaConfig, dtype_bytes: int, *, num_sequences: int = 1, policy: QuantizationPolicy = UNQUANTIZED
) -> int:
    """Estimates how many bytes of weights are read by a decode step with one token for each of `num_sequences`
    sequences. The step reads all weights except the embedding and the experts that no token chooses. The estimate
    assumes that all experts are equally likely."""
    total = weight_bytes(config, dtype_bytes, policy=policy)
    if not config.tie_word_embeddings or policy.quantization_of("head") is not None:
        total -= config.vocab_size * config.hidden_size * dtype_bytes
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** num_sequences
    for matrix, size in _sizes(config, dtype_bytes, policy):
        if matrix.role == "experts":
            total -= round(matrix.count * missed * size)
    return total


@dataclass(frozen=True, slots=True)
class Matrix:
    """A group of weight matrices with the same shape, [rows, inputs]. The field `role` names the part of the model that
    uses the matrices, for example "attention" or "experts". A quantisation policy chooses the format of the matrices by
    this name. The field `count` is the number of matrices in the group."""

    role: Role
    rows: int
    inputs: int
    count: int


def matrices(config: JambaConfig) -> Iterator[Matrix]:
    """Yields the groups of weight matrices that a quantisation policy may quantise. The output head is included even if
    the output head and the embedding share one weight."""
    h, d, f = config.hidden_size, config.d_inner, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mamba = len(config.attention_layers), len(config.mamba_layers)
    moe = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    yield Matrix("attention", q + 2 * kv, h, attention)
    yield Matrix("attention", h, q, attention)
    yield Matrix("mamba", 2 * d, h, mamba)
    yield Matrix("mamba", h, d, mamba)
    feed_forward: tuple[tuple[Role, int], ...] = (
        ("mlp", config.num_hidden_layers - moe),
        ("experts", moe * config.num_experts),
    )
    for role, count in feed_forward:
        yield Matrix(role, 2 * f, h, count)
        yield Matrix(role, h, f, count)
    if not config.is_classifier:
        yield Matrix("head", config.vocab_size, h, 1)


def fused_products(config: JambaConfig) -> Iterator[list[tuple[Matrix, list[str]]]]:
    """Yields lists of matrix products that one kernel computes together. Each product has the names of the weights that
    are joined in its matrix. The two products of a layer of experts form one list; the count of their matrices is the
    number of experts. An output head that is tied to the embedding is left out."""
    h, d, f = config.hidden_size, config.d_inner, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def product(role: Role, rows: int, inputs: int, prefix: str, *names: str) -> list[tuple[Matrix, list[str]]]:
        return [(Matrix(role, rows, inputs, 1), [f"{prefix}{name}_proj.weight" for name in names])]

    for i in range(config.num_hidden_layers):
        mixer = f"model.layers.{i}.{'self_attn' if config.is_attention(i) else 'mamba'}."
        feed_forward, count = f"model.layers.{i}.feed_forward.", config.num_experts
        if config.is_attention(i):
            yield product("attention", q + 2 * kv, h, mixer, "q", "k", "v")
            yield product("attention", h, q, mixer, "o")
        else:
            yield product("mamba", 2 * d, h, mixer, "in")
            yield product("mamba", h, d, mixer, "out")
        if config.is_moe(i):
            gate_up, down = expert_names(f"{feed_forward}experts.", count)
            yield [(Matrix("experts", 2 * f, h, count), gate_up), (Matrix("experts", h, f, count), down)]
        else:
            yield product("mlp", 2 * f, h, feed_forward, "gate", "up")
            yield product("mlp", h, f, feed_forward, "down")
    if not config.is_classifier and not config.tie_word_embeddings:
        yield [(Matrix("head", config.vocab_size, h, 1), ["lm_head.weight"])]


def kept_blocks(config: JambaConfig, device: str) -> Mapping[str, Format]:
    """Returns the names and formats of the weights that are kept in the format of the checkpoint when the model runs on
    `device`. Only the CPU kernels can read such weights. A weight is kept only if all weights of its fused product can
    be kept."""
    blocks = {name: entry.format for name, entry in config.stored.items() if entry.format is not None}
    if device != "cpu" or not blocks:
        return {}
    groups = [[names for _, names in products] for products in fused_products(config)]
    kept = [names for group in groups if shared_formats(blocks, group) is not None for names in group]
    return {name: blocks[name] for names in kept for name in names}


def policy_of(engine: EngineConfig, config: JambaConfig, device: str) -> QuantizationPolicy:
    """Returns the policy for a model on `device`, with the options in `engine`. Raises ConfigError for options that do
    not fit to the checkpoint."""
    blocks = {} if engine.load_format == "dummy" else kept_blocks(config, device)
    roles, at_load = config.quantized_roles, config.made_at_load
    return QuantizationPolicy.of(engine, roles, at_load, blocks, config.stored_format)
