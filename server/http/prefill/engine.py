"""The engine of a decode server: it has long prompts computed elsewhere before it runs their requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jamba_server.engine.process.client import Engine, Health, SupervisionStats, UpdateStream
from jamba_server.engine.types import EngineInfo, EngineStats, Request, StoredSegment

if TYPE_CHECKING:
    from jamba_server.server.http.prefill.hand_overs import HandOvers


@dataclass(frozen=True, slots=True)
class DecodeEngine:
    """Implements `engine.process.client.Engine` with another engine. Entering `generate` takes until the prompts have
    been handed over, and `hand_overs` limits this time."""

    engine: Engine
    hand_overs: HandOvers

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    @property
    def supervision(self) -> SupervisionStats:
        return self.engine.supervision

    @property
    def health(self) -> Health:
        return self.engine.health

    async def first_start(self) -> None:
        await self.engine.first_start()

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[UpdateStream]:
        await self.hand_overs.prepare(requests)
        async with self.engine.generate(requests) as updates:
            yield updates

    def unpin(self, request_id: str) -> None:
        self.engine.unpin(request_id)

    def arrived(self, segments: list[StoredSegment]) -> None:
        self.engine.arrived(segments)
