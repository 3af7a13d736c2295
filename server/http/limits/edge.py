"""The class `Edge` holds the objects that limit what clients can demand of the HTTP process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from jamba_server.engine.types import EngineStats
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections.counts import ConnectionCounts
from jamba_server.server.http.limits.bodies import BodyMemory
from jamba_server.server.http.limits.forecast import Forecast
from jamba_server.server.http.limits.key_file import read_keys
from jamba_server.server.http.limits.keys import Keys
from jamba_server.server.http.limits.waiting import WaitingTokens


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Edge:
    """Holds the API keys with their limits, and the counters of waiting prompt tokens, bytes of request bodies, and
    connections."""

    keys: Keys
    waiting: WaitingTokens
    bodies: BodyMemory
    connections: ConnectionCounts = field(default_factory=ConnectionCounts)

    @classmethod
    def of(cls, config: ServerConfig, stats: Callable[[], EngineStats]) -> Self:
        """Returns the limits that a configuration asks for. `stats` returns the engine's latest statistics. Raises
        ConfigError if the file of the API keys cannot be used."""
        return cls(
            keys=Keys(read_keys(config.api_key, config.api_key_file)),
            waiting=WaitingTokens(config.max_queue_tokens, Forecast(stats)),
            bodies=BodyMemory(config.body_memory_bytes),
        )
