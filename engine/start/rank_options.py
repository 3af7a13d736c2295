"""Checks the options of an engine with several ranks before any of them starts. Works without torch."""

from __future__ import annotations

from pathlib import Path

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.parallel.shards import Parts, Shard, check_size
from jamba_server.engine.start.tier_sizes import has_tiers
from jamba_server.engine.weight_sizes import policy_of


def shard_of(config: EngineConfig, rank: int) -> Shard:
    """Returns the shard of a rank."""
    size, exact = config.tensor_parallel_size, config.tensor_parallel_exact
    return Shard(rank, size, size > 1 if exact is None else exact)


def check_options(config: EngineConfig) -> None:
    """Raises ConfigError for options that an engine with several ranks, or with sections of sums, does not support."""
    size, exact = config.tensor_parallel_size, shard_of(config, 0).exact
    check_size(size)
    if size > 1 and has_tiers(config):
        named = "state_cache_disk_path" if config.state_cache_disk_path is not None else "state_cache_host_bytes"
        raise ConfigError(
            f"{named} does not work with tensor_parallel_size {size} yet: the tiers keep the states of one rank."
        )
    if exact and config.activation_quantization == "int8":
        raise ConfigError(
            "activation_quantization 'int8' and tensor_parallel_exact exclude each other: sums in sections have "
            "activations of the model's dtype."
        )


def check_ranks(config: EngineConfig) -> None:
    """Raises ConfigError if the options do not work with several ranks, or if the model cannot be divided among them.
    Raises CheckpointError if its configuration cannot be read."""
    check_options(config)
    model = load_model_config(Path(config.model))
    policy = policy_of(config, model)
    for rank in range(config.tensor_parallel_size):
        Parts.of(model, shard_of(config, rank), policy)
