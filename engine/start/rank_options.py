"""Checks the options of an engine with several ranks before any of them starts. Works without torch.

The ranks are numbered by stages: those of the first stage come first, and those of a stage divide its layers among
each other.
"""

from __future__ import annotations

from pathlib import Path

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.device_map import check_kind, num_devices, stages_of_map
from jamba_server.engine.parallel.shards import Parts, Shard, check_size
from jamba_server.engine.parallel.stages import Stage, even_stages
from jamba_server.engine.start.tier_sizes import has_tiers
from jamba_server.engine.weight_sizes import policy_of


def shard_of(config: EngineConfig, rank: int) -> Shard:
    """Returns the shard of a rank."""
    size, exact = config.tensor_parallel_size, config.tensor_parallel_exact
    return Shard(rank % size, size, size > 1 if exact is None else exact)


def num_stages(config: EngineConfig) -> int:
    """Returns the number of stages. Raises ConfigError if a device map names what is no device."""
    return config.pipeline_parallel_size if config.device_map is None else num_devices(config.device_map)


def num_ranks(config: EngineConfig) -> int:
    """Returns the number of ranks, each of which is a process."""
    return config.tensor_parallel_size * num_stages(config)


def ranks_per_node(config: EngineConfig) -> int:
    """Returns the number of ranks on each of the machines."""
    return num_ranks(config) // config.nnodes


def ranks_of_node(config: EngineConfig, node: int) -> range:
    """Returns the ranks that run on a machine. Each has equally many, in the order of the machines."""
    each = ranks_per_node(config)
    return range(node * each, (node + 1) * each)


def stages_of(config: EngineConfig, model: JambaConfig) -> tuple[Stage, ...]:
    """Returns the stages of a model. Raises ConfigError if it cannot be divided into them."""
    if config.device_map is not None:
        return stages_of_map(config.device_map, model)
    return even_stages(model.num_hidden_layers, config.pipeline_parallel_size)


def check_options(config: EngineConfig) -> None:
    """Raises ConfigError for options that an engine with several ranks, or with sections of sums, does not support."""
    size, exact = config.tensor_parallel_size, shard_of(config, 0).exact
    check_size(size)
    if config.pipeline_parallel_size < 1:
        raise ConfigError(f"pipeline_parallel_size is {config.pipeline_parallel_size}; it must be at least 1.")
    stages = num_stages(config)
    if config.device_map is not None:
        if config.pipeline_parallel_size not in (1, stages):
            raise ConfigError(
                f"pipeline_parallel_size is {config.pipeline_parallel_size}, but device_map has {stages} devices; "
                "leave one of the options out."
            )
        if config.device != "auto":
            check_kind(config.device_map, config.device)
    if size * stages % config.nnodes:
        raise ConfigError(
            f"nnodes is {config.nnodes}, but tensor_parallel_size {size} and pipeline_parallel_size {stages} make "
            f"{size * stages} ranks; each node must have equally many."
        )
    if stages > 1 and config.async_scheduling:
        raise ConfigError(
            f"async_scheduling does not work with pipeline_parallel_size {stages}, which has several steps in flight "
            "already; leave the option out."
        )
    if size * stages > 1 and has_tiers(config):
        named = "state_cache_disk_path" if config.state_cache_disk_path is not None else "state_cache_host_bytes"
        name, value = ("tensor_parallel_size", size) if size > 1 else ("pipeline_parallel_size", stages)
        raise ConfigError(f"{named} does not work with {name} {value} yet: the tiers keep the states of one rank.")
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
    stages_of(config, model)
    for rank in range(config.tensor_parallel_size):
        Parts.of(model, shard_of(config, rank), policy)
