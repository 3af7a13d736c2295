"""The asyncio interface through which the HTTP process uses the engine.

`Engine` is the protocol that the server uses. `EngineClient` implements it with a child process. If the child dies,
`EngineClient` starts a new one and sends it the running requests, so that their streams continue where they stopped.
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
from jamba_server.engine.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    EngineFailed,
    EngineLoading,
    Overloaded,
    RequestRejected,
)
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

MAX_DEATHS = 3  # after this number of engine deaths within DEATH_WINDOW_SECONDS the engine is not restarted
DEATH_WINDOW_SECONDS = 60.0
# If a request was running when this number of successive engine processes died, the engine runs that request alone.
SUSPECT_DEATHS = 2


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the engine.

    `ready` says that the engine accepts requests now. If `alive` is false, the engine has ended and is not restarted,
    and `reason` says why. `loading` is the progress of the first start; it is None from then on, also during restarts.
    """

    alive: bool
    ready: bool
    reason: str = ""
    loading: Progress | None = None


class UpdateStream(Protocol):
    """The updates of several requests, in the order in which the updates arrive. The stream ends when every request has
    finished or was aborted."""

    def __aiter__(self) -> AsyncIterator[TokenUpdate]: ...

    async def __anext__(self) -> TokenUpdate: ...

    def abort(self, request_id: str) -> None:
        """Aborts one of the requests. The stream yields no further update of that request. A second call for the same
        request does nothing."""
        ...


class Engine(Protocol):
    """The interface of the engine for the server. Requests to the engine and updates from the engine have token ids,
    not text."""

    @property
    def info(self) -> EngineInfo:
        """The properties of the engine's model and the sizes that the engine chose. Before the engine is ready for the
        first time, this property raises EngineLoading. If the engine failed to start, this property raises
        EngineDead."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's latest statistics. A restart of the engine does not reset the counters in these statistics."""
        ...

    @property
    def health(self) -> Health: ...

    async def first_start(self) -> None:
        """Waits until the engine is ready for the first time or has failed to start. If the engine has failed to start,
        the property `info` raises EngineDead afterwards."""
        ...

    def generate(self, requests: list[Request]) -> AbstractAsyncContextManager[UpdateStream]:
        """Runs the engine requests of one HTTP request, one for each reply. Yields the updates of all replies,
        interleaved, until every reply has a finish_reason.

        Entering the context submits the requests. Leaving it, also by an exception, aborts those that still run.
        Entering raises Overloaded if the queue is full, EngineDead if the engine has ended for good, and
        RequestRejected for an unsupported kind of request. Iterating raises EngineDead and EngineFailed.
        """
        ...


class _Live:
    """A request that has been submitted and has not ended. The attribute `deaths` counts successive engine processes
    that died while they ran this request."""

    def __init__(self, request: Request, stream: _Stream) -> None:
        self.request, self.stream = request, stream
        self.sent = self.started = self.announced = False
        self.deaths = 0
        self.generated: list[int] = []
        self.num_prompt_logprobs = 0

    def replay(self) -> Request:
        """Returns the request in the form that is sent to an engine process. The result includes the reply tokens that
        the client has received already. So a restarted engine continues the reply after these tokens."""
        return msgspec.structs.replace(
            self.request, generated=self.generated, num_prompt_logprobs=self.num_prompt_logprobs
        )

    def take(self, update: TokenUpdate) -> TokenUpdate:
        """Records the tokens of an update and returns the update for the stream.

        The number of cached tokens and the queue time are delivered only once per request. A new engine reports them
        again, so that they are removed from later updates.
        """
        self.generated += update.token_ids
        self.num_prompt_logprobs += len(update.prompt_logprobs)
        if self.announced:
            return msgspec.structs.replace(update, num_cached=None, queue_seconds=None)
        self.announced = True
        return update


class _Stream:
    """The `UpdateStream` of one call of `EngineClient.generate`."""

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
    """Runs the engine as a child process. Kills a child process that hangs, and starts a new child process when one has
    died.

    The child is killed if it has requests but sends no step result for `engine_timeout` seconds. New requests are
    refused if more than `max_queue_requests` choices would wait with them; 0 means no limit.
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
        self._live: dict[str, _Live] = {}  # all requests that have not ended, in the order of their arrival
        self._child: Child | None = None
        self._info: EngineInfo | None = None
        self._health = _loading(Progress("starting the engine", 0.0))
        self._stats, self._base = EngineStats(), EngineStats()
        self._deaths: deque[float] = deque()
        self._started = asyncio.Event()  # set when the engine is ready for the first time or has failed to start
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
        """The process id of the current child process."""
        return self._child.pid if self._child else None

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it is ready. If the engine fails to start, raises ConfigError with the
        reason."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        await self._started.wait()
        if self._info is None:
            await self._supervisor
            raise ConfigError(self._health.reason)
        return self._info

    async def close(self) -> None:
        """Ends the engine. Requests that have not ended fail with EngineDead."""
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
        num_waiting, limit = sum(not live.started for live in self._live.values()), self._max_queue
        if limit and len(requests) > limit:  # such a request could never be admitted, so 503 would mislead its client
            raise RequestRejected(
                f"The request asks for {len(requests)} choices; the limit (--max-queue-requests) is {limit}.", param="n"
            )
        if limit and num_waiting + len(requests) > limit:
            raise Overloaded(
                f"{num_waiting} choices are waiting and the request has {len(requests)}; the limit "
                f"(--max-queue-requests) is {limit}.",
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
        """Aborts requests whose updates nobody reads any more. Ids of requests that have ended already are ignored."""
        gone = [live for i in request_ids if (live := self._live.pop(i, None)) is not None]
        if self._child and (sent := [live.request.id for live in gone if live.sent]):
            self._child.send(Abort(sent))
        self._dispatch()

    # Sending requests to the child process ----------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Sends to the child process all requests that have not been sent to this child process yet. If some requests
        are suspected of killing the engine, only one of these suspects is sent.

        A suspect is a request that ran during SUSPECT_DEATHS successive deaths. If the engine dies while a suspect runs
        alone, that request is the cause.
        """
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
        """Fails the requests with more tokens than the maximum context length of a restarted engine.

        A restarted engine that finds less memory than the one before may have a shorter maximum context.
        """
        limit = self.info.max_model_len
        for live in list(self._live.values()):
            length = len(live.request.prompt) + len(live.generated)
            if not live.sent and length > limit:
                message = (
                    f"The engine was restarted with a context of {limit} tokens; this request has {length} tokens."
                )
                self._fail(live, EngineFailed(message))

    # Supervising the child process ------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while self._health.alive:
            try:
                self._child = await Child.spawn(self._config, self._command)
            except OSError as error:
                self._give_up(f"the engine process cannot be started: {error}")
                return
            if not self._health.alive:
                self._child.shut_down()  # `close` was called while the child was starting
            watchdog = asyncio.create_task(self._watch(self._child), name="engine watchdog")
            try:
                while (message := await self._child.receive(FromEngine)) is not None:
                    self._receive(message)
            finally:
                watchdog.cancel()
            self._after_death(await self._child.close())

    async def _watch(self, child: Child) -> None:
        """Kills the child if it has requests but sends no step result for `engine_timeout` seconds."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            if any(live.sent for live in self._live.values()) and child.silent_seconds > self._timeout:
                logger.error(
                    "the engine is killed: it sent no step result for %.0f s (--engine-timeout)", self._timeout
                )
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
            return  # `close` was called while the engine was loading
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
                continue  # the request was aborted while the step ran
            live.stream.queue.put_nowait(live.take(update))
            if update.finish_reason:
                finished = True
                del self._live[update.request_id]
        if finished:
            self._dispatch()

    def _after_death(self, status: int) -> None:
        """Decides, after the child has ended, whether the engine is restarted and which requests fail.

        `status` is the exit status of the child, or the negative number of the signal that ended it.
        """
        if not self._health.alive:
            return
        reason = f"the engine process ended with {_describe(status)}"
        if self._info is None:
            self._give_up(f"{reason} while loading")
            return
        self._base = msgspec.structs.replace(self._stats, num_running=0, num_waiting=0)
        self._stats = self._base
        was_running = [live for live in self._live.values() if live.sent]
        culprit = was_running[0] if len(was_running) == 1 and was_running[0].deaths >= SUSPECT_DEATHS else None
        if culprit is not None:
            self._deaths.clear()  # the culprit caused these deaths, so the deaths do not count towards MAX_DEATHS
            self._fail(
                culprit,
                EngineFailed(
                    "The engine ended three times while it ran this request; the last time it ran nothing else."
                ),
            )
        for live in self._live.values():
            live.deaths = live.deaths + 1 if live.sent else 0
            live.sent = False
        if culprit is None and self._count_death() >= MAX_DEATHS:
            when = f"within {DEATH_WINDOW_SECONDS:.0f} s" if self._health.ready else "in a row, now while loading"
            self._give_up(f"{reason}, the third time {when}")
            return
        logger.error("%s; it is restarted and continues %d requests", reason, len(self._live))
        self._health = Health(alive=True, ready=False, reason=f"{reason} and is restarting")

    def _count_death(self) -> int:
        """Records that the engine process has just died. Returns the number of deaths during the most recent
        DEATH_WINDOW_SECONDS.

        Until the engine is ready again, earlier deaths stay counted however old they are. Otherwise an engine that dies
        after each long load would be restarted for ever.
        """
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
    """Returns the statistics `now` of the current engine process, with the counters of all earlier engine processes
    added to the counters in `now`. The argument `base` has the counters of all earlier engine processes."""
    totals = {f: getattr(base, f) + getattr(now, f) for f in EngineStats.__struct_fields__ if f.endswith("_total")}
    return msgspec.structs.replace(now, **totals)


def _loading(progress: Progress) -> Health:
    return Health(alive=True, ready=False, reason="the engine is loading", loading=progress)


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
