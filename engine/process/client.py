"""The asyncio side of the engine: what the HTTP process sees of it.

`Engine` is the protocol that the server is written against; `EngineClient` implements it with a child process, which it
restarts when it dies, so that streams go on where they were.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead, EngineError, EngineFailed, EngineLoading, Overloaded
from jamba_server.engine.process.child import ENGINE_COMMAND, Child
from jamba_server.engine.types import (
    Abort,
    EngineInfo,
    EngineStats,
    Failed,
    FromEngine,
    LogLine,
    Progress,
    Ready,
    Request,
    StepResult,
    Submit,
    TokenUpdate,
)
from jamba_server.engine.validation import validate_kind

logger = logging.getLogger(__name__)

MAX_DEATHS = 3  # within DEATH_WINDOW_SECONDS; then the engine stays dead
DEATH_WINDOW_SECONDS = 60.0
SUSPECT_DEATHS = 2  # a request present in so many deaths in a row runs alone


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`ready`: requests are accepted now. Not `alive`: the engine is gone for good, `reason` says why. `loading` says
    how far the first start is, and is None once the engine has been ready: a restart is no first start."""

    alive: bool
    ready: bool
    reason: str = ""
    loading: Progress | None = None


class UpdateStream(Protocol):
    """Updates of some requests, interleaved; ends when every one has finished or was aborted."""

    def __aiter__(self) -> AsyncIterator[TokenUpdate]: ...

    async def __anext__(self) -> TokenUpdate: ...

    def abort(self, request_id: str) -> None:
        """Ends one of the requests; no update of it follows. Idempotent."""
        ...


class Engine(Protocol):
    """Token ids in, token ids out."""

    @property
    def info(self) -> EngineInfo:
        """What runs. Raises EngineLoading (or EngineDead) before the engine was ready for the first time."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest numbers; its counters go on across restarts of the engine."""
        ...

    @property
    def health(self) -> Health: ...

    async def first_start(self) -> None:
        """Returns when the engine has been ready for the first time, or is given up; then `info` says which."""
        ...

    def generate(self, requests: list[Request]) -> AbstractAsyncContextManager[UpdateStream]:
        """Runs the choices of one HTTP request; their updates arrive interleaved, until every one has a finish_reason.

        Entering submits; leaving, however it happens, aborts what still runs and releases all. Raises Overloaded on
        entry when the queue is full, EngineDead when there is no engine, RequestRejected for a kind of request that no
        engine serves; EngineDead and EngineFailed while iterating.
        """
        ...


class _Live:
    """A request between submission and end. `deaths`: engines that died in a row with it on board."""

    def __init__(self, request: Request, stream: _Stream) -> None:
        self.request, self.stream = request, stream
        self.sent = self.started = self.announced = False
        self.deaths = 0
        self.generated: list[int] = []
        self.num_prompt_logprobs = 0

    def replay(self) -> Request:
        """The request as the next engine needs it: it goes on after what has been delivered."""
        return msgspec.structs.replace(
            self.request, generated=self.generated, num_prompt_logprobs=self.num_prompt_logprobs
        )

    def take(self, update: TokenUpdate) -> TokenUpdate:
        """Books an update. What comes once a request (cached tokens, queue time) comes once, also after a replay."""
        self.generated += update.token_ids
        self.num_prompt_logprobs += len(update.prompt_logprobs)
        if self.announced:
            return msgspec.structs.replace(update, num_cached=None, queue_seconds=None)
        self.announced = True
        return update


class _Stream:
    """`UpdateStream` of one `generate` call."""

    def __init__(self, client: EngineClient, request_ids: list[str]) -> None:
        self._client = client
        self.open = set(request_ids)
        self.queue: asyncio.Queue[TokenUpdate | EngineError] = asyncio.Queue()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> TokenUpdate:
        while self.open or not self.queue.empty():
            item = await self.queue.get()
            if isinstance(item, EngineError):
                raise item
            if item.request_id in self.open:
                if item.finish_reason:
                    self.open.discard(item.request_id)
                return item
        raise StopAsyncIteration

    def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.open.discard(request_id)
            self._client.forget([request_id])

    def close(self) -> None:
        request_ids, self.open = sorted(self.open), set()
        self._client.forget(request_ids)


class EngineClient:
    """Runs the engine as a child process and supervises it.

    `engine_timeout`: seconds without a step result, while work waits, after which the child counts as dead.
    `max_queue_requests`: choices that may wait before new requests are refused; 0 for no bound.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        engine_timeout: float = 120.0,
        max_queue_requests: int = 0,
        on_progress: Callable[[str, float], None] = lambda phase, fraction: None,
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        self._command = command
        self._config, self._timeout, self._on_progress = config, engine_timeout, on_progress
        self._max_queue = max_queue_requests
        self._live: dict[str, _Live] = {}  # in the order of arrival
        self._child: Child | None = None
        self._info: EngineInfo | None = None
        self._health = _loading(Progress("starting the engine", 0.0))
        self._stats, self._base = EngineStats(), EngineStats()
        self._deaths: deque[float] = deque()
        self._started = asyncio.Event()  # ready for the first time, or given up
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineLoading(self._health.reason) if self._health.alive else EngineDead(self._health.reason)
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def health(self) -> Health:
        return self._health

    async def first_start(self) -> None:
        await self._started.wait()

    @property
    def pid(self) -> int | None:
        """Process id of the child that runs now."""
        return self._child.pid if self._child else None

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it is ready. Raises ConfigError with its reason if it cannot be."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        await self._started.wait()
        if self._info is None:
            await self._supervisor
            raise ConfigError(self._health.reason)
        return self._info

    async def close(self) -> None:
        """Ends the engine; requests that still run fail with EngineDead."""
        self._give_up("the server is shutting down")
        if self._supervisor is None:
            return
        if self._child:
            self._child.shut_down()
        await self._supervisor

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[_Stream]:
        for request in requests:
            validate_kind(request.kind)
        if not self._health.alive:
            raise EngineDead(self._health.reason)
        num_waiting = sum(not live.started for live in self._live.values())
        if self._max_queue and num_waiting >= self._max_queue:
            raise Overloaded(
                f"{num_waiting} requests wait already; the limit (--max-queue-requests) is {self._max_queue}.",
                retry_after=1 + num_waiting // max(1, self.info.max_num_seqs),
            )
        stream = _Stream(self, [request.id for request in requests])
        for request in requests:
            assert request.id not in self._live, f"request id {request.id} is taken"
            self._live[request.id] = _Live(request, stream)
        try:
            self._dispatch()
            yield stream
        finally:
            stream.close()

    def forget(self, request_ids: list[str]) -> None:
        """Ends requests at their client's wish; unknown ids have ended already."""
        gone = [live for i in request_ids if (live := self._live.pop(i, None)) is not None]
        if self._child and (sent := [live.request.id for live in gone if live.sent]):
            self._child.send(Abort(sent))
        self._dispatch()

    # Sending ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Sends what may run now: everything, or a single suspect while there are some."""
        if not self._health.ready or self._child is None:
            return
        self._fail_too_long()
        suspects = [live for live in self._live.values() if live.deaths >= SUSPECT_DEATHS]
        if not suspects:
            batch = [live for live in self._live.values() if not live.sent]
        elif any(live.sent for live in self._live.values()):
            batch = []
        else:
            batch = suspects[:1]
        if batch:
            if not any(live.sent for live in self._live.values()):
                self._child.touch()
            self._child.send(Submit([live.replay() for live in batch]))
            for live in batch:
                live.sent = True

    def _fail_too_long(self) -> None:
        """An engine that found less memory than the one before it may have a shorter context: what was accepted for the
        old one must not reach it."""
        limit = self.info.max_model_len
        for live in list(self._live.values()):
            length = len(live.request.prompt) + len(live.generated)
            if not live.sent and length > limit:
                message = f"The engine was restarted with room for {limit} tokens; this request has {length}."
                self._fail(live, EngineFailed(message))

    # Supervising ------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while self._health.alive:
            try:
                self._child = await Child.spawn(self._config, self._command)
            except OSError as error:
                self._give_up(f"the engine process cannot be started: {error}")
                return
            if not self._health.alive:
                self._child.shut_down()  # closed while it was starting
            watchdog = asyncio.create_task(self._watch(self._child), name="engine watchdog")
            try:
                while (message := await self._child.receive(FromEngine)) is not None:
                    self._receive(message)
            finally:
                watchdog.cancel()
            self._bury(await self._child.close())

    async def _watch(self, child: Child) -> None:
        """Kills a child that has work but says nothing for the engine timeout."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            if any(live.sent for live in self._live.values()) and child.silent_seconds > self._timeout:
                logger.error("no step result for %.0f s (--engine-timeout): the engine is killed", self._timeout)
                child.kill()
                return

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Progress(phase, fraction):
                if self._health.loading:
                    self._health = _loading(message)
                self._on_progress(phase, fraction)
            case LogLine(level, name, text):
                logging.getLogger(name).log(level, "%s", text)
            case Ready(info):
                self._ready(info)
            case Failed(reason):
                self._give_up(reason)
            case StepResult():
                self._book(message)

    def _ready(self, info: EngineInfo) -> None:
        if not self._health.alive:
            return  # closed while it was loading
        self._info, self._health = info, Health(alive=True, ready=True)
        self._started.set()
        self._dispatch()

    def _book(self, result: StepResult) -> None:
        self._stats = _continue(self._base, result.stats)
        for request_id in result.started:
            if live := self._live.get(request_id):
                live.started = True
        finished = False
        for update in result.updates:
            if (live := self._live.get(update.request_id)) is None:
                continue  # aborted meanwhile
            live.stream.queue.put_nowait(live.take(update))
            if update.finish_reason:
                finished = True
                del self._live[update.request_id]
        if finished:
            self._dispatch()

    def _bury(self, status: int) -> None:
        """After the child's end: decides whether to try again, and with which requests."""
        if not self._health.alive:
            return
        reason = f"the engine process ended with {_describe(status)}"
        if self._info is None:
            self._give_up(f"{reason} while loading")
            return
        self._base = msgspec.structs.replace(self._stats, num_running=0, num_waiting=0)
        self._stats = self._base
        aboard = [live for live in self._live.values() if live.sent]
        alone = aboard[0] if len(aboard) == 1 and aboard[0].deaths >= SUSPECT_DEATHS else None
        if alone is not None:
            self._deaths.clear()  # it explains them
            self._fail(
                alone, EngineFailed("The engine ended three times while it ran this request, the last time alone.")
            )
        for live in self._live.values():
            live.deaths = live.deaths + 1 if live.sent else 0
            live.sent = False
        if alone is None and self._count_death() >= MAX_DEATHS:
            when = f"within {DEATH_WINDOW_SECONDS:.0f} s" if self._health.ready else "in a row, now while loading"
            self._give_up(f"{reason}, the third time {when}")
            return
        logger.error("%s; it is restarted and goes on with %d requests", reason, len(self._live))
        self._health = Health(alive=True, ready=False, reason=f"{reason} and is restarting")

    def _count_death(self) -> int:
        """Deaths within the window, this one included. While the engine is not ready again none drops out: one
        that dies after a long load would be restarted for ever."""
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        while self._health.ready and now - self._deaths[0] > DEATH_WINDOW_SECONDS:
            self._deaths.popleft()
        return len(self._deaths)

    def _fail(self, live: _Live, error: EngineError) -> None:
        del self._live[live.request.id]
        live.stream.queue.put_nowait(error)

    def _give_up(self, reason: str) -> None:
        if not self._health.alive:
            return
        self._health = Health(alive=False, ready=False, reason=reason)
        self._started.set()
        for live in list(self._live.values()):
            self._fail(live, EngineDead(reason))


def _continue(base: EngineStats, now: EngineStats) -> EngineStats:
    """`now` with its counters added to those of the engines before."""
    totals = {f: getattr(base, f) + getattr(now, f) for f in EngineStats.__struct_fields__ if f.endswith("_total")}
    return msgspec.structs.replace(now, **totals)


def _loading(progress: Progress) -> Health:
    return Health(alive=True, ready=False, reason="the engine is loading", loading=progress)


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
