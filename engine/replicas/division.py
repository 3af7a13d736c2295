"""Divides a machine among several engines, and refuses options that do not work with them. Works without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.place import Place
from jamba_server.engine.start.machine import available_memory, format_bytes
from jamba_server.engine.start.processors import Processors, find_processors
from jamba_server.engine.start.rank_options import num_ranks


@dataclass(frozen=True, slots=True)
class Division:
    """The configuration and the place of each engine, and the choice in words."""

    configs: tuple[EngineConfig, ...]
    places: tuple[Place, ...]
    description: str


def check_replicas(config: EngineConfig, number: int) -> None:
    """Raises ConfigError for options that do not work with several engines."""
    refused = {
        "state_cache_host_bytes": config.state_cache_host_bytes > 0,
        "state_cache_disk_path": config.state_cache_disk_path is not None,
    }
    for name, is_set in refused.items():
        if number > 1 and is_set:
            raise ConfigError(
                f"{name} {getattr(config, name)!r} does not work with data_parallel_size {number} yet; leave one out."
            )


def divide(config: EngineConfig, number: int, processors: Processors | None = None) -> Division:
    """Returns what each of `number` engines gets of this machine. Raises ConfigError for options that do not work.

    * The usable processors are divided among the engines and their ranks, each of which has at least one thread. If the
      number of memory nodes is a multiple of the number of engines, or the other way round, each engine runs on
      processors of its own, so that its memory is on the same node. Otherwise no process is bound to processors.
    * The memory that is available now, or `cpu_memory_bytes`, is divided among engines on a CPU. An engine that is
      restarted gets the same share again, while the others have theirs.
    * Of the GPUs that this process sees, each engine sees as many as it has ranks, in their order.
    """
    check_replicas(config, number)
    ranks = num_ranks(config)
    found = find_processors() if processors is None else processors
    threads = max(1, found.usable // (number * ranks)) if config.threads is None else config.threads
    memory = (available_memory() if config.cpu_memory_bytes is None else config.cpu_memory_bytes) // number
    shares = _bound(found, number)
    each = msgspec.structs.replace(config, threads=threads, cpu_memory_bytes=memory)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(number * ranks)] if visible is None else [gpu for gpu in visible.split(",") if gpu]
    places = tuple(
        Place(
            name=f"engine {i}: ",
            processors=None if shares is None else shares[i],
            environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * ranks : (i + 1) * ranks])},
        )
        for i in range(number)
    )
    where = "" if shares is None else ", on processors of its own"
    count = "1 thread" if threads == 1 else f"{threads} threads"
    words = (
        f"{number}; on a CPU each with {count}{where} and {format_bytes(memory)} of memory, on GPUs each with its own"
        if ranks == 1
        else f"{number} with {ranks} processes each; on a CPU each process with {count}, and each engine with "
        f"{format_bytes(memory)} of memory{where}; on GPUs each process with its own"
    )
    return Division((each,) * number, places, words)


def _bound(processors: Processors, number: int) -> list[tuple[int, ...]] | None:
    """Returns the processors of each engine if there are several memory nodes that can be divided evenly."""
    nodes = processors.nodes
    if len(nodes) < 2 or max(len(nodes), number) % min(len(nodes), number):
        return None
    if len(nodes) >= number:
        per = len(nodes) // number
        return [tuple(sorted(sum(nodes[i * per : (i + 1) * per], ()))) for i in range(number)]
    per = number // len(nodes)
    shares = [node[i * len(node) // per : (i + 1) * len(node) // per] for node in nodes for i in range(per)]
    return shares if all(shares) else None
