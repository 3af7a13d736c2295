"""Computes the cache layout of a model (page size; sizes and dtypes of keys, values and states) from the model's
configuration. This module does not import torch."""

from __future__ import annotations

from typing import cast

from jamba_server.engine.cache.layout import CacheDtype, CacheLayout, attention_cache, mamba_cache
from jamba_server.engine.config import EngineConfig, KvCacheDtype, StateCacheDtype
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.shards import Parts


def cache_layout(
    config: JambaConfig,
    *,
    block_size: int,
    dtype: str,
    kv_cache_dtype: KvCacheDtype = "auto",
    state_cache_dtype: StateCacheDtype = "auto",
    parts: Parts | None = None,
) -> CacheLayout:
    """Returns the cache layout of a Jamba model: keys and values for its attention layers, states for its Mamba layers.
    `dtype` is the dtype of the model's activations. If `parts` is given, the layout has what a rank keeps of them, for
    the layers of its stage."""
    own = cast(CacheDtype, dtype)
    attention = attention_cache(
        block_size=block_size,
        num_kv_heads=config.num_key_value_heads if parts is None else len(parts.kv_heads),
        head_dim=config.head_dim,
        dtype=own if kv_cache_dtype == "auto" else "float8_e4m3fn",
    )
    mamba = mamba_cache(
        d_inner=config.d_inner if parts is None else len(parts.channels),
        d_state=config.mamba_d_state,
        d_conv=config.mamba_d_conv,
        dtype=own,
        compressed=state_cache_dtype != "auto",
    )
    layers = range(config.num_hidden_layers) if parts is None else parts.stage.layers
    kinds = (config.is_attention(i) for i in layers)
    return CacheLayout(block_size, tuple(attention if is_attention else mamba for is_attention in kinds))


def wanted_layout(config: JambaConfig, engine: EngineConfig, parts: Parts | None = None) -> CacheLayout:
    """Returns the cache layout with the page size and the dtypes that the options in `engine` ask for, or what the rank
    that owns `parts` keeps of it."""
    return cache_layout(
        config,
        block_size=engine.block_size,
        dtype=config.dtype if engine.dtype == "auto" else engine.dtype,
        kv_cache_dtype=engine.kv_cache_dtype,
        state_cache_dtype=engine.state_cache_dtype,
        parts=parts,
    )
