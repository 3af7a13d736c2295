"""The client of an engine whose ranks run on several nodes. It runs on node 0, in the HTTP process."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.nodes.coordinator import Coordinator, NodesMissing
from jamba_server.engine.nodes.options import NodeOptions
from jamba_server.engine.process.child import ENGINE_COMMAND, Child
from jamba_server.engine.process.client import EngineClient, Health
from jamba_server.engine.start.rank_options import check_ranks
from jamba_server.engine.types import EngineInfo


class NodesClient(EngineClient):
    """An `EngineClient` that starts an engine process only when all nodes have joined. `settings` are further arguments
    of `EngineClient`. Raises ConfigError if the model
    cannot be divided among the ranks, or if node 0 cannot listen at its address."""

    def __init__(self, config: EngineConfig, options: NodeOptions, **settings: Any) -> None:
        check_ranks(config)
        self.coordinator = Coordinator(config, options)
        self._spawn_child = partial(Child.spawn, config, ENGINE_COMMAND)
        super().__init__(config, spawn=self._spawn, **settings)

    @property
    def health(self) -> Health:
        state = super().health
        if not state.alive or not (awaited := self.coordinator.awaited):
            return state
        # A node may have left before the engine has noticed that.
        reason = "; ".join(filter(None, (f"{awaited} must join", state.reason)))
        return msgspec.structs.replace(state, ready=False, reason=reason)

    async def start(self) -> EngineInfo:
        await self.coordinator.start()
        return await super().start()

    async def close(self) -> None:
        state = super().health
        self.coordinator.stop_waiting()
        await super().close()
        await self.coordinator.close(state.reason or "the server is shutting down", failed=not state.alive)

    async def _spawn(self) -> Child:
        try:
            return await self.coordinator.spawn(self._spawn_child)
        except NodesMissing as error:
            self.give_up(str(error))
            raise
