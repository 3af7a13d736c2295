"""Several engines that look like one to the server: `Engines` implements `process.client.Engine`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead, EngineError, EngineLoading
from jamba_server.engine.process.child import ENGINE_COMMAND
from jamba_server.engine.process.client import EngineClient, Health, SupervisionStats
from jamba_server.engine.process.queue_limit import check_queue
from jamba_server.engine.process.streams import Stream
from jamba_server.engine.replicas.division import divide
from jamba_server.engine.replicas.known_prefixes import prefix_keys
from jamba_server.engine.replicas.routing import ROUTE_REASONS, Route, Router, RouteReason, Work
from jamba_server.engine.replicas.totals import total_health, total_info, total_stats, total_supervision
from jamba_server.engine.types import EngineInfo, EngineStats, Request, StoredSegment

logger = logging.getLogger(__name__)

LEAST = "with the least to do, because there is no prefix cache"


class Engines:
    """Runs several engine processes with the same model, each on its part of the machine, and sends each request to one
    of them (`routing.Router`). All choices and prompts of a request run on the same engine.

    Each engine is supervised as if it were alone: when it dies, its requests go on in the process that replaces it. New
    requests go to engines that are ready. If none is ready, they wait for one that is being restarted. The arguments
    are those of `EngineClient`; `max_queue_requests` limits the queues of all engines together.
    """

    def __init__(
        self,
        config: EngineConfig,
        number: int,
        *,
        engine_timeout: float = 120.0,
        load_timeout: float = 600.0,
        max_queue_requests: int = 0,
        on_progress: Callable[[str, float], None] = lambda phase, fraction: None,
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        division = divide(config, number)
        logger.info("engines   %s", division.description)
        rule = "that has most of its prompt cached, unless it has much more to do than another"
        logger.info("routing   a request goes to the engine %s", rule if config.enable_prefix_caching else LEAST)

        def report(engine: int) -> Callable[[str, float], None]:
            return lambda phase, fraction: on_progress(f"engine {engine}: {phase}", fraction)

        self.members: tuple[EngineClient, ...] = tuple(
            EngineClient(
                own,
                engine_timeout=engine_timeout,
                load_timeout=load_timeout,
                on_progress=report(i),
                command=command,
                place=place,
            )
            for i, (own, place) in enumerate(zip(division.configs, division.places, strict=True))
        )
        # How often each engine was chosen, for each reason.
        self.routed: tuple[dict[RouteReason, int], ...] = tuple(dict.fromkeys(ROUTE_REASONS, 0) for _ in self.members)
        self._caching, self._max_queue = config.enable_prefix_caching, max_queue_requests
        self._router = Router(number)
        self._restarts = [0] * number  # of each engine, when its prefixes were last forgotten
        # For each request that has not ended, the number of prompt tokens that its engine probably has to compute.
        self._missing: dict[str, int] = {}

    @property
    def info(self) -> EngineInfo:
        infos = self._infos()
        if any(infos):
            return total_info(infos)
        health = self.health
        raise EngineLoading(health.reason) if health.alive else EngineDead(health.reason)

    @property
    def stats(self) -> EngineStats:
        return total_stats([engine.stats for engine in self.members], self._infos())

    @property
    def supervision(self) -> SupervisionStats:
        return total_supervision([engine.supervision for engine in self.members])

    @property
    def health(self) -> Health:
        return total_health([engine.health for engine in self.members])

    async def first_start(self) -> None:
        """Waits until an engine is ready for the first time, or all have failed to start."""
        starts = [asyncio.create_task(engine.first_start()) for engine in self.members]
        try:
            for next_start in asyncio.as_completed(starts):
                await next_start
                if any(self._infos()):
                    return
        finally:
            for start in starts:
                start.cancel()

    async def ended(self) -> str:
        """Waits until no engine is left, and returns the reasons."""
        reasons = await asyncio.gather(*(engine.ended() for engine in self.members))
        return "; ".join(f"engine {i}: {reason}" for i, reason in enumerate(reasons))

    async def start(self) -> EngineInfo:
        """Starts all engines and waits until all are ready. Requests are served when the first one is. Raises
        ConfigError if an engine fails to start, or if only some of the engines have found a GPU."""
        starts = [asyncio.create_task(engine.start(), name="engine start") for engine in self.members]
        try:
            infos = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        if len(kinds := {info.device.partition(":")[0] for info in infos}) > 1:
            raise ConfigError(
                f"data_parallel_size is {len(infos)}, but the engines have found {' and '.join(sorted(kinds))}: each "
                f"engine needs a GPU of its own. Set device to 'cpu', or make it smaller."
            )
        return total_info(infos)

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self.members))

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[Stream]:
        if not requests[0].is_background:
            check_queue(self._max_queue, len(requests), [engine.load for engine in self.members])
        route, keys = self._route(requests)
        ids = [request.id for request in requests]
        async with self.members[route.engine].generate(requests) as stream:
            self.routed[route.engine][route.reason] += 1
            for own in keys:
                self._router.sent(route.engine, own)
            # The other choices of a prompt wait for the first one, and then have its prefix.
            others = {id(r.prompt): len(r.prompt) for r in requests if r.prompt is not requests[0].prompt}
            self._missing[ids[0]] = route.missing + sum(others.values())
            logger.debug("%s goes to engine %d (%s), which misses %d tokens", ids[0], *_words(route))
            try:
                yield stream
            finally:
                del self._missing[ids[0]]

    def unpin(self, request_id: str) -> None:
        for engine in self.members:  # the other engines do not know this id, and ignore it
            engine.unpin(request_id)

    def arrived(self, segments: list[StoredSegment]) -> None:
        for engine in self.members:
            engine.arrived(segments)

    def _infos(self) -> list[EngineInfo | None]:
        return [_info(engine) for engine in self.members]

    def _route(self, requests: Sequence[Request]) -> tuple[Route, list[list[int]]]:
        """Returns the engine for the requests, and the prefix keys of each prompt that the engine will have cached.
        Raises EngineDead if no engine is left."""
        alive = [i for i, engine in enumerate(self.members) if engine.health.alive]
        if not alive:
            raise EngineDead(self.health.reason)
        for i, engine in enumerate(self.members):
            if engine.num_restarts != self._restarts[i]:
                self._restarts[i] = engine.num_restarts
                self._router.forget(i)
        ready = [i for i in alive if self.members[i].health.ready] or alive
        first = requests[0]
        prompts = {id(request.prompt): request for request in requests if self._caching}
        keys = {i: prefix_keys(request.prompt, request.cache_salt) for i, request in prompts.items()}
        read = keys.get(id(first.prompt), []) if first.cache.read else []
        work = [self._work(engine, background=first.is_background) for engine in self.members]
        route = self._router.route(len(first.prompt), read, work, ready)
        return route, [own for i, own in keys.items() if prompts[i].cache.write]

    def _work(self, engine: EngineClient, *, background: bool) -> Work:
        """Returns what an engine has to do before, or beside, a new request. Requests in the background delay only each
        other."""
        tokens = replies = 0
        for request, started in engine.live_requests():
            if request.is_background and not background:
                continue
            if started:
                replies += 1
            else:
                tokens += self._missing.get(request.id, 0)
        return Work(tokens, replies)


def _info(engine: EngineClient) -> EngineInfo | None:
    try:
        return engine.info
    except EngineError:
        return None


def _words(route: Route) -> tuple[int, str, int]:
    return route.engine, route.reason, route.missing
