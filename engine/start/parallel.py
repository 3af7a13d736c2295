"""Joins the ranks of an engine, and makes all of them use the same sizes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch
from torch.distributed import FileStore

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.parallel.group import Group
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.start.memory_plan import MemoryPlan
from jamba_server.engine.start.rank_options import shard_of


def choose_device(config: EngineConfig) -> torch.device:
    """Returns the device to run on. The option value "auto" means the GPU if torch sees one, else the CPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but this torch sees no GPU. Use --device cpu or auto.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def join_ranks(config: EngineConfig, rank: int, store: str) -> Group:
    """Waits until all ranks are there, and returns their group. They find each other in the file at the path `store`,
    which is empty at first. Raises ConfigError if there are fewer GPUs than ranks."""
    check_devices(config)
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


def check_devices(config: EngineConfig) -> None:
    """Raises ConfigError if there are fewer GPUs than ranks."""
    size, count = config.tensor_parallel_size, torch.cuda.device_count()
    if size > 1 and config.device != "cpu" and 0 < count < size:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this machine has {count} GPUs. Each rank needs one of its own."
        )


def of_rank(config: EngineConfig) -> EngineConfig:
    """Returns the options with what a rank decides where they leave it open: its number of CPU threads, if it shares
    the processors with other ranks, and that sums in sections have activations of the model's dtype."""
    threads, size = config.threads, config.tensor_parallel_size
    if threads is None and size > 1:
        threads = max(1, available_cpus() // size)
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
