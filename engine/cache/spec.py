"""CacheSpec: what a page, a slot and a saved state weigh. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.engine.config import EngineConfig, KvCacheDtype, StateCacheDtype
from jamba_server.engine.model_config import JambaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """Bytes per unit.

    A page: K and V of `block_size` tokens of all attention layers, in the model's dtype or one byte a number. A slot:
    the last W-1 inputs of the convolution [W-1, D] in the model's dtype and the SSM state [D, S] in float32, of all
    Mamba layers. A checkpoint: the same, or with the SSM state in one byte a number and a float32 scale a channel [D].
    """

    block_size: int
    kv_bytes_per_token: int
    bytes_per_page: int
    bytes_per_slot: int
    bytes_per_saved_state: int

    @classmethod
    def of(
        cls,
        config: JambaConfig,
        *,
        block_size: int,
        dtype_bytes: int,
        kv_cache_dtype: KvCacheDtype = "auto",
        state_cache_dtype: StateCacheDtype = "auto",
    ) -> CacheSpec:
        kv_bytes = dtype_bytes if kv_cache_dtype == "auto" else 1
        kv = len(config.attention_layers) * 2 * config.num_key_value_heads * config.head_dim * kv_bytes
        conv = (config.mamba_d_conv - 1) * config.d_inner * dtype_bytes
        ssm = config.d_inner * config.mamba_d_state * 4
        saved = ssm if state_cache_dtype == "auto" else config.d_inner * (config.mamba_d_state + 4)
        return cls(
            block_size=block_size,
            kv_bytes_per_token=kv,
            bytes_per_page=block_size * kv,
            bytes_per_slot=len(config.mamba_layers) * (conv + ssm),
            bytes_per_saved_state=len(config.mamba_layers) * (conv + saved),
        )

    @classmethod
    def wanted(cls, config: JambaConfig, engine: EngineConfig, *, dtype_bytes: int) -> CacheSpec:
        """What `engine` asks for."""
        return cls.of(
            config,
            block_size=engine.block_size,
            dtype_bytes=dtype_bytes,
            kv_cache_dtype=engine.kv_cache_dtype,
            state_cache_dtype=engine.state_cache_dtype,
        )

    def pages(self, num_tokens: int) -> int:
        """Pages that one sequence of `num_tokens` takes at most: one extra for a partly filled page that is copied."""
        return -(-num_tokens // self.block_size) + 1

    def sequence_bytes(self, num_tokens: int) -> int:
        """Pages and slot of one sequence of `num_tokens`."""
        return self.pages(num_tokens) * self.bytes_per_page + self.bytes_per_slot
