"""The class `Edge` has all that bounds what clients may make the server hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections.counts import ConnectionCounts
from jamba_server.server.http.limits.bodies import BodyMemory
from jamba_server.server.http.limits.key_file import read_keys
from jamba_server.server.http.limits.keys import Keys
from jamba_server.server.http.limits.waiting import WaitingTokens


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Edge:
    """The API keys with their limits, and the counts of prompt tokens, bodies and connections."""

    keys: Keys
    waiting: WaitingTokens
    bodies: BodyMemory
    connections: ConnectionCounts = field(default_factory=ConnectionCounts)

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """Raises ConfigError if the file of the API keys cannot be used."""
        return cls(
            keys=Keys(read_keys(config.api_key, config.api_key_file)),
            waiting=WaitingTokens(config.max_queue_tokens),
            bodies=BodyMemory(config.body_memory_bytes),
        )
