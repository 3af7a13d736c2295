"""Checks the options of an engine with several ranks, and makes all ranks use the same sizes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch
from torch.distributed import FileStore

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.parallel.group import Group
from jamba_server.engine.parallel.shards import Shard
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.start.memory_plan import MemoryPlan
from jamba_server.engine.start.tier_sizes import has_tiers


def choose_device(config: EngineConfig) -> torch.device:
    """Returns the device to run on. The option value "auto" means the GPU if torch sees one, else the CPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but this torch sees no GPU. Use --device cpu or auto.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def shard_of(config: EngineConfig, rank: int) -> Shard:
    """Returns the shard of a rank."""
    size, exact = config.tensor_parallel_size, config.tensor_parallel_exact
    return Shard(rank, size, size > 1 if exact is None else exact)


def join_ranks(config: EngineConfig, rank: int, store: str) -> Group:
    """Waits until all ranks are there, and returns their group. They find each other in the file at the path `store`,
    which is empty at first. Raises ConfigError for options that an engine with several ranks does not support."""
    check_parallel(config)
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    group = Group.join(shard_of(config, rank), FileStore(store, config.tensor_parallel_size), device)
    group.smallest([0], device)
    return group


def alone(config: EngineConfig) -> Group:
    """Returns the group of an engine in one process. Raises ConfigError if the options ask for several ranks."""
    if config.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, but this engine runs in one process; the limit "
            "is 1 here. `jamba serve` starts a process for each rank."
        )
    return Group(shard_of(config, 0))


def check_parallel(config: EngineConfig) -> None:
    """Raises ConfigError for options that an engine with several ranks, or with sections of sums, does not support."""
    size, exact = config.tensor_parallel_size, shard_of(config, 0).exact
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
    if size > 1 and config.device != "cpu" and 0 < torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this machine has {torch.cuda.device_count()} GPUs. Each rank needs "
            "one of its own."
        )


def of_rank(config: EngineConfig) -> EngineConfig:
    """Returns the options with what a rank decides where they leave it open: its number of CPU threads, and that sums
    in sections have activations of the model's dtype."""
    threads = config.threads or max(1, available_cpus() // config.tensor_parallel_size)
    activations = "none" if shard_of(config, 0).exact else config.activation_quantization
    return msgspec.structs.replace(config, threads=threads, activation_quantization=activations)


def agreed(plan: MemoryPlan, group: Group, device: torch.device) -> MemoryPlan:
    """Returns a plan with the smallest sizes of all ranks' plans. The memory that it counts is that of this rank."""
    if group.shard.size == 1:
        return plan
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages", "num_slots", "num_compressed")
    sizes = dict(zip(names, group.smallest([getattr(plan, name) for name in names], device), strict=True))
    state_bytes = plan.state_bytes * (sizes["num_slots"] + sizes["num_compressed"])
    return replace(
        plan,
        **sizes,
        kv_bytes=plan.kv_bytes // plan.num_pages * sizes["num_pages"],
        state_bytes=state_bytes // (plan.num_slots + plan.num_compressed),
    )
