"""Computes how many bytes the weights of a model take, and which weights are kept in the format in which the checkpoint
stores them.

This module works without torch, so that the command `jamba plan` does not need torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.model_config import JambaConfig, linear_modules, scan_parameters
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.quantization import UNQUANTIZED, Format, QuantizationPolicy, Role
from jamba_server.engine.quantization.blocks import common_format, expert_names

_EMBEDDING = "model.embed_tokens.weight"


def weight_bytes(config: JambaConfig, dtype_bytes: int, *, policy: QuantizationPolicy = UNQUANTIZED) -> int:
    """Returns the size of the loaded weights in bytes. Mamba's A, D and dt bias are in float32. If `policy` quantises a
    weight, the size of the weight includes its scales. Elements of weights that are neither quantised nor in float32
    take `dtype_bytes` bytes each. If the output head is tied to the embedding, it takes memory of its own only if this
    server quantises it, because the embedding then stays unquantised.
    """
    scan = len(config.mamba_layers) * config.d_inner * scan_parameters(config)
    total = (config.num_parameters() - scan) * dtype_bytes + 4 * scan
    for _, _, size, numbers in _sizes(config, dtype_bytes, policy):
        total += size - numbers * dtype_bytes
    if config.tie_word_embeddings and not config.is_classifier and policy.quantization_of("head") is not None:
        total += policy.num_bytes("head", config.vocab_size, config.hidden_size, dtype_bytes=dtype_bytes)
    return total


def rank_weight_bytes(
    config: JambaConfig, dtype_bytes: int, *, parts: Parts, policy: QuantizationPolicy = UNQUANTIZED
) -> int:
    """Returns the size in bytes of the loaded weights of the rank that owns `parts`. It counts as `weight_bytes` does.
    Norms, routers and the head of a classifier are on every rank of their stage. The last of several stages has a copy
    of an embedding to which the head is tied."""
    if parts.num_ranks == 1:
        return weight_bytes(config, dtype_bytes, policy=policy)
    stage, h, channels = parts.stage, config.hidden_size, len(parts.channels)
    of_matrices = sum(size for _, _, size, _ in _sizes(config, dtype_bytes, policy, parts))
    of_matrices += _tied_head_bytes(config, dtype_bytes, policy, parts)
    layers = sum(not config.is_attention(i) for i in stage.layers)
    norms = (2 * len(stage.layers) + stage.is_last) * h
    norms += layers * (config.mamba_dt_rank + 2 * config.mamba_d_state + config.mamba_proj_bias * h)
    per_channel = config.mamba_d_conv + config.mamba_conv_bias + 2 * config.mamba_proj_bias
    score_bias = config.num_labels * config.score_bias if config.is_classifier and stage.is_last else 0
    others = norms + layers * channels * per_channel + score_bias
    return of_matrices + others * dtype_bytes + 4 * layers * channels * scan_parameters(config)


def _tied_head_bytes(config: JambaConfig, dtype_bytes: int, policy: QuantizationPolicy, parts: Parts) -> int:
    """Returns the size in bytes of a head that is tied to the embedding, as far as it takes memory of its own."""
    if not config.tie_word_embeddings or config.is_classifier or not parts.stage.is_last:
        return 0
    rows, form = len(parts.vocabulary), policy.blocks.get(_EMBEDDING)
    if policy.quantization_of("head") is None:
        if parts.stage.is_first:
            return 0
        if form is not None:
            return form.num_bytes(rows, config.hidden_size)
    return policy.num_bytes("head", rows, config.hidden_size, dtype_bytes=dtype_bytes)


def _own_shape(name: str, role: Role, rows: int, inputs: int, parts: Parts) -> tuple[int, int]:
    """Returns the rows and inputs of a weight matrix that a rank has."""
    inner = parts.experts if role == "experts" else parts.inner
    by_rows = {
        "q_proj": parts.heads,
        "k_proj": parts.kv_heads,
        "v_proj": parts.kv_heads,
        "in_proj": parts.channels,
        "dt_proj": parts.channels,
        "gate_proj": inner,
        "up_proj": inner,
        "embed_tokens": parts.vocabulary,
        "lm_head": parts.vocabulary,
    }
    by_inputs = {"o_proj": parts.heads, "x_proj": parts.channels, "out_proj": parts.channels, "down_proj": inner}
    kind = name.rsplit(".", 2)[-2]
    if (own := by_rows.get(kind)) is not None:
        return rows // own.total * len(own), inputs
    if (own := by_inputs.get(kind)) is not None:
        return rows, inputs // own.total * len(own)
    return rows, inputs


def _sizes(
    config: JambaConfig, dtype_bytes: int, policy: QuantizationPolicy, parts: Parts | None = None
) -> Iterator[tuple[str, Role, int, int]]:
    """Yields the name of each weight matrix, the part of the model that uses it, its size in bytes, and its number of
    elements. If `parts` is given, the sizes are those of what a rank owns of the matrices of its stage."""
    for name, role, rows, inputs in weight_matrices(config):
        if parts is not None:
            if parts.stage.is_elsewhere(name):
                continue
            rows, inputs = _own_shape(name, role, rows, inputs, parts)
        form = policy.blocks.get(name)
        plain = policy.num_bytes(role, rows, inputs, dtype_bytes=dtype_bytes)
        yield name, role, plain if form is None else form.num_bytes(rows, inputs), rows * inputs


def step_bytes(
    config: JambaConfig,
    dtype_bytes: int,
    *,
    num_sequences: int = 1,
    policy: QuantizationPolicy = UNQUANTIZED,
    parts: Parts | None = None,
) -> int:
    """Estimates how many bytes of weights are read by a decode step with one token for each of `num_sequences`
    sequences. The step reads all weights except the embedding and the experts that no token chooses. The estimate
    assumes that all experts are equally likely. If `parts` is given, it counts what the rank that owns them reads."""
    total = weight_bytes(config, dtype_bytes, policy=policy)
    if parts is not None:
        total = rank_weight_bytes(config, dtype_bytes, parts=parts, policy=policy)
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** num_sequences
    experts = 0
    for name, role, size, _ in _sizes(config, dtype_bytes, policy, parts):
        is_read = config.tie_word_embeddings and policy.quantization_of("head") is None
        is_read = is_read and (parts is None or parts.stage.is_last)
        if name == _EMBEDDING and not is_read:
            total -= size
        experts += size if role == "experts" else 0
    return total - round(missed * experts)


def weight_matrices(config: JambaConfig) -> Iterator[tuple[str, Role, int, int]]:
    """Yields the name of each weight matrix in a checkpoint, the part of the model that uses it, and its numbers of
    rows and inputs. The convolutions are left out, and so is a head that is tied to the embedding."""
    h, d, f, v = config.hidden_size, config.d_inner, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rank, states = config.mamba_dt_rank, config.mamba_d_state
    shapes = {
        "q_proj": (q, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, q),
        "in_proj": (2 * d, h),
        "x_proj": (rank + 2 * states, d),
        "dt_proj": (d, rank),
        "out_proj": (h, d),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
        "router": (config.num_experts, h),
        "score": (config.num_labels, h),
        "lm_head": (v, h),
    }
    yield _EMBEDDING, "other", v, h
    for name, role in linear_modules(config):
        yield f"{name}.weight", role, *shapes[name.rpartition(".")[2]]


def kept_formats(config: JambaConfig) -> Mapping[str, Format]:
    """Returns the names of the weights that stay quantised as the checkpoint has them, and their formats in memory.

    The weights of all experts of a layer are in one format for the gate and up projections, and in one for the down
    projections. They stay quantised only if there are both formats.
    """
    stored = {name: entry.format for name, entry in config.stored.items() if entry.format is not None}
    if not stored:
        return {}
    roles = {name: role for name, role, _, _ in weight_matrices(config)}
    kept = {name: form for name, form in stored.items() if roles.get(name, "experts") != "experts"}
    for layer in filter(config.is_moe, range(config.num_hidden_layers)):
        products = expert_names(f"model.layers.{layer}.feed_forward.experts.", config.num_experts)
        formats = [
            common_format(stored[name] for name in names) if stored.keys() >= set(names) else None for names in products
        ]
        if None not in formats:
            kept |= {name: form for names, form in zip(products, formats, strict=True) if form for name in names}
    return kept


def policy_of(engine: EngineConfig, config: JambaConfig) -> QuantizationPolicy:
    """Returns the policy for a model with the options in `engine`. Raises ConfigError for options that do
    not fit to the checkpoint."""
    blocks = {} if engine.load_format == "dummy" else kept_formats(config)
    roles, at_load = config.quantized_roles, config.made_at_load
    return QuantizationPolicy.of(engine, roles, at_load, blocks, config.stored_format)
