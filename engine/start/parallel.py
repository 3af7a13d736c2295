"""Joins the ranks of an engine, and makes all of them use the same sizes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch.distributed import FileStore, PrefixStore, Store, TCPStore

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.device_map import check_kind
from jamba_server.engine.parallel.group import TIMEOUT, Group
from jamba_server.engine.parallel.meeting import LOOPBACK, Meeting
from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.parallel.stages import Stage
from jamba_server.engine.start.fingerprint import processor_of
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.start.memory_plan import MemoryPlan, smallest_plan
from jamba_server.engine.start.rank_options import num_ranks, num_stages, ranks_per_node, shard_of, stages_of

logger = logging.getLogger(__name__)


class Joined(NamedTuple):
    """What a rank shares with the others: its `group` has the ranks that divide the same layers among each other, and
    its `pipe` those that have the same part of other layers."""

    group: Group
    pipe: Pipe

    @classmethod
    def meet(
        cls,
        config: EngineConfig,
        stages: Sequence[Stage],
        rank: int,
        store: Store,
        device: torch.device,
        timeout: timedelta = TIMEOUT,
        host: str = LOOPBACK,
    ) -> Joined:
        """Waits until all ranks have met in `store`. Neighbouring ranks have the same stage. On a CPU, this rank
        listens at the address `host`."""
        shard, stage = shard_of(config, rank), stages[rank // config.tensor_parallel_size]
        group = Group.join(shard, PrefixStore(f"stage {stage.index}", store), device, timeout, host)
        if stage.count == 1:
            return cls(group, Pipe(stage))
        return cls(group, Pipe.join(stage, PrefixStore(f"pipe {shard.rank}", store), device, timeout, host))

    @property
    def num_ranks(self) -> int:
        return self.group.shard.size * self.pipe.stage.count

    def build(self) -> dict[str, Any]:
        """Returns the arguments that `build_model` needs to know what this rank owns."""
        return {"group": self.group, "stage": self.pipe.stage}

    def smallest(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Returns the smallest of all ranks' numbers, for each of `numbers`. It waits for all ranks."""
        return self.pipe.smallest(self.group.smallest(numbers, device))


def choose_device(config: EngineConfig) -> torch.device:
    """Returns the device to run on. The option value "auto" means the GPU if torch sees one, else the CPU. Raises
    ConfigError if there is no such device, or if a device map has devices of another kind."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was requested, but this torch sees no GPU. Use --device cpu or auto.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if config.device_map is not None:
        check_kind(config.device_map, name)
    return torch.device(name)


def join_ranks(config: EngineConfig, rank: int, meeting: Meeting) -> Joined:
    """Waits until all ranks are there, and returns what this rank shares with them. Raises ConfigError if this machine
    has fewer GPUs than ranks, or if it computes other bits than that of rank 0."""
    check_devices(config)
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(rank % ranks_per_node(config))
    stages = stages_of(config, load_model_config(Path(config.model)))
    store = open_store(meeting, num_ranks(config))
    if config.nnodes > 1:
        check_processor(store, rank, rank // ranks_per_node(config), device)
    joined = Joined.meet(config, stages, rank, store, device, host=meeting.host)
    joined.smallest([0], device)
    if joined.pipe.stage.count > 1:
        logger.info("this process runs %s", joined.pipe.stage)
    return joined


def open_store(meeting: Meeting, size: int) -> Store:
    """Returns the store in which `size` ranks find each other."""
    if meeting.store is None:
        return FileStore(meeting.path, size)
    host, port = meeting.store
    if meeting.listener is None:
        return TCPStore(host, port, is_master=False)
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.listener)


def check_processor(store: Store, rank: int, node: int, device: torch.device) -> None:
    """Raises ConfigError if this rank, on the machine `node`, has another kind of processor or other compiled kernels
    than rank 0. Their last bits may differ, and ranks compute some numbers, such as those of a router, each by itself.
    """
    own = processor_of(device)
    if rank == 0:
        store.set("processor", json.dumps(own))
        return
    if (first := json.loads(store.get("processor"))) != own:
        raise ConfigError(
            f"node {node} computes with {' '.join(own)}, but node 0 with {' '.join(first)}; all nodes must have the "
            "same processors and compiled kernels."
        )


def alone(config: EngineConfig, model: JambaConfig) -> Joined:
    """Returns the only rank of an engine in one process. Raises ConfigError if the options ask for several ranks."""
    for name, size in (
        ("tensor_parallel_size", config.tensor_parallel_size), ("pipeline_parallel_size", num_stages(config)),
        ("nnodes", config.nnodes),
    ):  # fmt: skip
        if size != 1:
            raise ConfigError(
                f"{name} is {size}, but this engine runs in one process; the limit is 1 here. `jamba serve` starts a "
                "process for each rank."
            )
    [stage] = stages_of(config, model)
    return Joined(Group(shard_of(config, 0)), Pipe(stage))


def check_devices(config: EngineConfig) -> None:
    """Raises ConfigError if this machine has fewer GPUs than ranks."""
    size, count = ranks_per_node(config), torch.cuda.device_count()
    if num_ranks(config) > 1 and config.device != "cpu" and 0 < count < size:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size} and pipeline_parallel_size is "
            f"{num_stages(config)}, but this machine has {count} GPUs. Each of its {size} ranks needs one of its own."
        )


def of_rank(config: EngineConfig) -> EngineConfig:
    """Returns the options with what a rank decides where they leave it open: its number of CPU threads, if it shares
    the processors with other ranks, and that sums in sections have activations of the model's dtype."""
    threads, size = config.threads, ranks_per_node(config)
    if threads is None and size > 1:
        threads = max(1, available_cpus() // size)
    activations = "none" if shard_of(config, 0).exact else config.activation_quantization
    return msgspec.structs.replace(config, threads=threads, activation_quantization=activations)


def agreed(plan: MemoryPlan, joined: Joined, device: torch.device) -> MemoryPlan:
    """Returns a plan with the smallest sizes of all ranks' plans. The memory that it counts is that of this rank."""
    if joined.num_ranks == 1:
        return plan
    return smallest_plan(plan, partial(joined.smallest, device=device))
