"""Makes the prefix cache, with the tiers that the options ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.cache.state_store import CompressedStates, SlotStates
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.cache.tiers.cache import TieredCache
from jamba_server.engine.cache.tiers.segment import SegmentLayout
from jamba_server.engine.cache.tiers.tiers import Tiers
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.worker import Worker
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.segment_mover import DeviceMover
from jamba_server.engine.start.memory_plan import MemoryPlan
from jamba_server.engine.start.tier_sizes import has_tiers


def check_folder(config: EngineConfig) -> None:
    """Raises ConfigError if the folder of the disk tier cannot be made or written to. This is found out before the
    weights are loaded."""
    if config.state_cache_disk_path is None:
        return
    path = Path(config.state_cache_disk_path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_cache_disk_path {path} cannot be made a folder: {error.strerror}.") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"state_cache_disk_path {path} is a folder that this user cannot read and write.")


def make_cache(
    config: EngineConfig,
    plan: MemoryPlan,
    storage: CacheStorage,
    layout: CacheLayout,
    *,
    worker: Worker | None,
    interval: int,
) -> CacheManager:
    """Returns the prefix cache. A state is saved every `interval` tokens. `worker` is the disk tier."""
    sizes: dict[str, Any] = {
        "num_pages": plan.num_pages,
        "block_size": config.block_size,
        "interval": interval,
        "enabled": config.enable_prefix_caching,
    }
    if plan.num_compressed:
        return CacheManager(CompressedStates(plan.num_slots, plan.num_compressed), **sizes)
    store = SlotStates(plan.num_slots)
    if not has_tiers(config):
        return CacheManager(store, **sizes)
    tiers = Tiers(block_size=config.block_size, host_bytes=config.state_cache_host_bytes, disk=worker)
    return TieredCache(store, tiers, DeviceMover(storage), SegmentLayout.of(layout), **sizes)


def make_worker(config: EngineConfig, layout: CacheLayout, fingerprint: Callable[[], str]) -> Worker | None:
    """Returns the threads of the disk tier, which have not started yet, or None without a disk tier. One of them calls
    `fingerprint`, which may wait for the hash of the weights."""
    if config.state_cache_disk_path is None:
        return None
    path, size = Path(config.state_cache_disk_path), config.state_cache_disk_bytes
    return Worker(lambda: SegmentFolder(path, fingerprint(), SegmentLayout.of(layout), size))
