"""Checks the options of the prefix cache's tiers and fits the host tier into memory. Works without torch."""

from __future__ import annotations

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.machine import format_bytes

HOST_SHARE = 0.5  # the largest share of the host's available memory that the host tier may take


def check_tiers(engine: EngineConfig) -> None:
    """Raises ConfigError if a tier is combined with an option that it does not support."""
    if engine.state_cache_host_bytes < 0 or engine.state_cache_disk_bytes < 1:
        raise ConfigError(
            f"state_cache_host_bytes is {engine.state_cache_host_bytes} and state_cache_disk_bytes is "
            f"{engine.state_cache_disk_bytes}; they must be at least 0 and 1."
        )
    named = "state_cache_disk_path" if engine.state_cache_disk_path is not None else "state_cache_host_bytes"
    if not has_tiers(engine):
        return
    if not engine.enable_prefix_caching:
        raise ConfigError(f"{named} extends the prefix cache, so it needs enable_prefix_caching.")
    if engine.state_cache_dtype != "auto":
        raise ConfigError(
            f"{named} and state_cache_dtype '{engine.state_cache_dtype}' exclude each other: the tiers hold states as "
            "running sequences have them."
        )


def has_tiers(engine: EngineConfig) -> bool:
    return engine.state_cache_disk_path is not None or engine.state_cache_host_bytes > 0


def with_host_tier(engine: EngineConfig, available: int) -> tuple[EngineConfig, tuple[str, ...]]:
    """Returns `engine` with a host tier that fits, and a warning if it is smaller than requested. `available` is the
    memory of the host in bytes that weights and caches leave free."""
    requested, limit = engine.state_cache_host_bytes, max(int(available * HOST_SHARE), 0)
    if requested <= limit:
        return engine, ()
    reason = f"the host tier may take half of the {format_bytes(max(available, 0))} that the host has left"
    warning = f"state_cache_host_bytes {requested} is reduced to {limit}: {reason}"
    return msgspec.structs.replace(engine, state_cache_host_bytes=limit), (warning,)
