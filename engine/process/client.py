"""The asyncio interface through which the HTTP process uses the engine.

`Engine` is the protocol that the server uses. `EngineClient` implements it with a child process. If the child dies,
`EngineClient` starts a new one and sends it the running requests, so that their streams continue where they stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead, EngineError, EngineFailed, EngineLoading
from jamba_server.engine.process.child import ENGINE_COMMAND, Child
from jamba_server.engine.process.deaths import RESTART_REASONS, Death, RestartReason
from jamba_server.engine.process.place import WHOLE_MACHINE, Place
from jamba_server.engine.process.queue_limit import Load, check_queue
from jamba_server.engine.process.restarts import RestartPolicy
from jamba_server.engine.process.step_times import StepHistogram, StepTimes, empty_histograms
from jamba_server.engine.process.streams import LiveRequest, Stream
from jamba_server.engine.process.supervisor import Supervisor
from jamba_server.engine.process.suspects import Suspects
from jamba_server.engine.process.totals import continued
from jamba_server.engine.types import (
    Abort,
    Adding,
    Arrived,
    EngineInfo,
    EngineStats,
    Failed,
    FromEngine,
    LogLine,
    Progress,
    Ready,
    Request,
    Starting,
    StepKind,
    StepResult,
    StoredSegment,
    Submit,
    TokenUpdate,
    Working,
)
from jamba_server.engine.validation import validate_kind

logger = logging.getLogger(__name__)


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the engine.

    `ready` says that the engine accepts requests now. If `alive` is false, the engine has ended and is not restarted,
    and `reason` says why. `loading` is the progress of the first start; it is None from then on, also during restarts.
    """

    alive: bool
    ready: bool
    reason: str = ""
    loading: Progress | None = None


class SupervisionStats(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics about the engine's steps, its restarts and slow readers since the server started. `restarts` has the
    number of restarts for each reason. `replayed_requests` counts requests that were sent again to a restarted engine.
    `pauses` counts how often a stream was paused because its reader was slow. `backlog_bytes` is the estimated size of
    all token updates that readers have not taken yet."""

    restarts: dict[RestartReason, int] = msgspec.field(default_factory=lambda: dict.fromkeys(RESTART_REASONS, 0))
    replayed_requests: int = 0
    pauses: int = 0
    backlog_bytes: int = 0
    step_times: dict[StepKind, StepHistogram] = msgspec.field(default_factory=empty_histograms)


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
    def supervision(self) -> SupervisionStats: ...

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

    def unpin(self, request_id: str) -> None:
        """Ends the pin of a request that has ended (`CacheUse.pin_seconds`), if it has not ended yet."""
        ...

    def arrived(self, segments: list[StoredSegment]) -> None:
        """Tells the engine of files that were put into the folder of its disk tier, before it searches the folder."""
        ...


class EngineClient:
    """Runs the engine as a child process. Kills a child process that hangs, and starts a new child process when one has
    died.

    The child is killed if it has requests but sends no message for `engine_timeout` seconds, or if it reports no
    progress for `load_timeout` seconds while it loads. A new request is refused if more than `max_queue_requests`
    choices would then wait to be run; 0 means no limit. Requests in the background are never refused and do not count.
    If the function `spawn` is given, it starts a child. Otherwise `command` is started on this machine, in `place`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        engine_timeout: float = 120.0,
        load_timeout: float = 600.0,
        max_queue_requests: int = 0,
        on_progress: Callable[[str, float], None] = lambda phase, fraction: None,
        command: tuple[str, ...] = ENGINE_COMMAND,
        place: Place = WHOLE_MACHINE,
        spawn: Callable[[], Awaitable[Child]] | None = None,
    ) -> None:
        self._on_progress = on_progress
        self._max_queue, self._name = max_queue_requests, place.name
        self._live: dict[str, LiveRequest] = {}  # holds all requests that have not ended, in the order of their arrival
        # The live requests that must still be sent to the present child, without those of paused streams.
        self._unsent: dict[str, LiveRequest] = {}
        # The live requests that were sent to the present child, by the ids that they have in the child.
        self._sent: dict[str, LiveRequest] = {}
        self._info: EngineInfo | None = None
        self._health = _loading(Progress("starting the engine", 0.0))
        self._stats, self._base = EngineStats(), EngineStats()
        # These requests are being put into the queue of the present child, as the child has announced.
        self._adding: list[LiveRequest] = []
        self._progressed = False  # says whether the present child has finished a step
        self._load_error = ""  # says why the present child cannot load the model
        self._restarts = dict.fromkeys(RESTART_REASONS, 0)
        self._num_replayed, self._num_pauses, self._step_times = 0, 0, StepTimes()
        self._suspects, self._policy = Suspects(), RestartPolicy()
        # This event is set when the engine is ready for the first time or has failed to start.
        self._started = asyncio.Event()
        self._ended = asyncio.Event()  # this event is set when the engine has ended and will not be restarted
        spawn = spawn or partial(Child.spawn, config, command, place)
        self._supervisor = Supervisor(self, spawn, engine_timeout=engine_timeout, load_timeout=load_timeout)
        self._supervision: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineLoading(self._health.reason) if self._health.alive else EngineDead(self._health.reason)
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def supervision(self) -> SupervisionStats:
        streams = {live.stream for live in self._live.values()}
        return SupervisionStats(
            restarts=dict(self._restarts),
            replayed_requests=self._num_replayed,
            pauses=self._num_pauses,
            backlog_bytes=sum(stream.backlog for stream in streams),
            step_times=self._step_times.histograms(),
        )

    @property
    def health(self) -> Health:
        return self._health

    async def first_start(self) -> None:
        await self._started.wait()

    async def ended(self) -> str:
        """Waits until the engine has ended and will not be restarted. Returns the reason."""
        await self._ended.wait()
        return self._health.reason

    @property
    def load(self) -> Load:
        others = [live for live in self._live.values() if not live.request.is_background]
        waiting = sum(not live.started for live in others)
        return Load(waiting, len(others) - waiting, self._info.max_num_seqs if self._info else 0)

    def live_requests(self) -> Iterator[tuple[Request, bool]]:
        """Yields the requests that have not ended, and whether an engine process has begun to compute each."""
        return ((live.request, live.started) for live in self._live.values())

    @property
    def num_restarts(self) -> int:
        return sum(self._restarts.values())

    @property
    def pid(self) -> int | None:
        """The process id of the current child process."""
        return self._supervisor.child.pid if self._supervisor.child else None

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it is ready. If the engine fails to start, raises ConfigError with the
        reason."""
        self._supervision = asyncio.create_task(self._supervisor.run(), name="engine supervisor")
        await self._started.wait()
        if self._info is None:
            await self._supervision
            raise ConfigError(self._health.reason)
        return self._info

    async def close(self) -> None:
        """Ends the engine. Requests that have not ended fail with EngineDead."""
        self._supervisor.stop()
        self.give_up("the server is shutting down")
        if self._supervision is not None:
            await self._supervision

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[Stream]:
        if self._info is not None:
            for request in requests:
                validate_kind(request.kind, self._info)
        if not self._health.alive:
            raise EngineDead(self._health.reason)
        if not requests[0].is_background:
            check_queue(self._max_queue, len(requests), [self.load])
        stream = Stream([request.id for request in requests], forget=self._forget, resume=self._resume)
        for request in requests:
            assert request.id not in self._live, f"request id {request.id} is taken"
            self._live[request.id] = self._unsent[request.id] = LiveRequest(request, stream)
        try:
            self._dispatch()
            yield stream
        finally:
            stream.close()

    # Sending requests to the child process ----------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Sends to the child process the requests that the child does not have yet. The requests of a paused stream are
        not sent. Requests that are suspected of crashing the engine are sent a few at a time (see the module
        `suspects`)."""
        child = self._supervisor.child
        if not self._health.ready or child is None:
            return
        self._fail_too_long()
        if batch := self._suspects.select(self._unsent.values(), idle=not self._sent):
            child.send(Submit([live.for_engine() for live in batch]))
            for live in batch:
                self._num_replayed += live.interrupted
                live.sent, live.interrupted = True, False
                del self._unsent[live.request.id]
                self._sent[live.engine_id] = live

    def _fail_too_long(self) -> None:
        """Fails the requests with more tokens than the maximum context length of a restarted engine.

        A restarted engine that finds less memory than the one before may have a shorter maximum context.
        """
        limit = self.info.max_model_len
        for live in list(self._unsent.values()):
            length = len(live.request.prompt) + len(live.generated)
            if length > limit:
                message = (
                    f"The engine was restarted with a context of {limit} tokens; this request has {length} tokens."
                )
                self._fail(live, EngineFailed(message))

    def _forget(self, request_ids: list[str]) -> None:
        """Aborts requests whose updates nobody will read. Ids of requests that have already ended are ignored."""
        self._abort([live for i in request_ids if (live := self._live.pop(i, None)) is not None])
        if self._suspects.on_trial:
            self._dispatch()

    def _pause(self, stream: Stream) -> None:
        """Pauses a stream: aborts its requests in the engine. They are sent to the engine again when the stream's
        reader has taken most of the updates that wait for it.

        The engine keeps the pages and the state of an aborted request in its prefix cache for as long as there is room.
        """
        logger.debug("a stream is paused: its reader has not taken %d bytes", stream.backlog)
        self._num_pauses += 1
        stream.paused = True
        paused = [live for i in sorted(stream.open) if (live := self._live.get(i)) is not None]
        self._abort(paused)
        for live in paused:
            live.pause()
        if self._suspects.on_trial:
            self._dispatch()

    def _resume(self, stream: Stream) -> None:
        stream.paused = False
        for request_id in sorted(stream.open):
            if (live := self._live.get(request_id)) is not None:
                live.paused = False
                self._unsent[request_id] = live
        self._dispatch()

    def _abort(self, requests: list[LiveRequest]) -> None:
        """Aborts requests in the child process and removes them from the lists of sent and unsent requests."""
        sent = [live.engine_id for live in requests if live.sent]
        for live in requests:
            self._sent.pop(live.engine_id, None)
            self._unsent.pop(live.request.id, None)
            live.leave_engine()
        if sent and self._supervisor.child:
            self._supervisor.child.send(Abort(sent))

    def unpin(self, request_id: str) -> None:
        if self._health.ready and self._supervisor.child:
            self._supervisor.child.send(Abort([request_id]))  # the abort of a request also ends its pin

    def arrived(self, segments: list[StoredSegment]) -> None:
        if self._health.ready and self._supervisor.child:
            self._supervisor.child.send(Arrived(segments))

    # The interface for the supervisor (class `supervisor.Owner`) ------------------------------------------------

    @property
    def is_loading(self) -> bool:
        return not self._health.ready

    @property
    def is_busy(self) -> bool:
        return bool(self._sent)

    def receive(self, message: FromEngine) -> None:
        match message:
            case Progress(phase, fraction):
                if self._health.loading:
                    self._health = _loading(message)
                self._on_progress(phase, fraction)
            case Working():
                pass  # the arrival of the message already shows the watchdog that the child works
            case LogLine(level, name, text):
                logging.getLogger(name).log(level, "%s%s", self._name, text)
            case Ready(info):
                self._ready(info)
            case Failed(reason):
                self._load_error = reason
            case Adding(request_ids):
                self._adding = self._known(request_ids)
            case Starting(request_ids):
                for live in self._known(request_ids):
                    live.started, live.running, live.queued = True, True, False
            case StepResult():
                self._book(message)

    def after_failed_spawn(self, error: OSError) -> float | None:
        reason = f"the engine process cannot be started: {error}"
        if self._info is None:
            self.give_up(reason)
        if not self._health.alive:
            return None
        self._restarts["spawn"] += 1
        delay = self._policy.after_failed_spawn()
        logger.error("%s%s; the next attempt is in %g s", self._name, reason, delay)
        self._health = Health(alive=True, ready=False, reason=reason)
        return delay

    def after_death(self, death: Death) -> float | None:
        reason = f"{death.text} while loading" if death.loading else death.text
        if self._load_error:
            reason, self._load_error = self._load_error, ""
        if self._info is None:
            self.give_up(reason)
        if not self._health.alive:
            return None
        self._base = msgspec.structs.replace(
            self._stats, num_running=0, num_waiting=0, num_background_running=0, num_background_waiting=0
        )
        self._stats = self._base
        delay = self._delay_after_death(death)
        if delay is None:
            self.give_up(f"{reason}, the third time in a row without a finished step")
            return None
        self._restarts[death.reason] += 1
        number = len(self._live)
        logger.error("%s%s; it is restarted in %g s and continues %d requests", self._name, reason, delay, number)
        self._health = Health(alive=True, ready=False, reason=f"{reason} and is restarting")
        return delay

    def give_up(self, reason: str) -> None:
        if not self._health.alive:
            return
        self._health = Health(alive=False, ready=False, reason=reason)
        self._started.set()
        self._ended.set()
        for live in list(self._live.values()):
            self._fail(live, EngineDead(reason))

    # Messages and the end of the child process ------------------------------------------------------------------

    def _ready(self, info: EngineInfo) -> None:
        if not self._health.alive:
            return  # `close` was called while the engine was loading
        self._info, self._health = info, Health(alive=True, ready=True)
        self._started.set()
        self._dispatch()

    def _known(self, request_ids: list[str]) -> list[LiveRequest]:
        """Returns the requests to which a message of the child process refers by these ids. Requests that were aborted
        meanwhile are left out."""
        return [live for request_id in request_ids if (live := self._sent.get(request_id)) is not None]

    def _book(self, result: StepResult) -> None:
        self._stats = continued(self._base, result.stats)
        if result.time is not None:
            self._step_times.add(result.time)
        if result.stats.num_steps_total:
            self._progressed = True
            self._policy.progressed()
        for live in self._adding:
            live.queued = not live.running
        self._adding = []
        # If the updates that wait in a stream were too many even before this step's updates, the stream's reader has
        # not kept up during a whole step. Such a stream is paused.
        slow = {live.stream for live in self._known([u.request_id for u in result.updates]) if live.stream.is_full}
        for update in result.updates:
            if (live := self._sent.get(update.request_id)) is None:
                continue  # the request was aborted while the step ran
            live.stream.put(live.take(update))
            if update.finish_reason:
                del self._live[live.request.id], self._sent[update.request_id]
                live.leave_engine()
        for stream in slow:
            self._pause(stream)
        if self._suspects.stepped():
            self._dispatch()

    def _delay_after_death(self, death: Death) -> float | None:
        """Prepares all requests for being sent to a new child process, because the present child has died. If the
        request that caused the death is known, that request fails. Returns the number of seconds until the next child
        is started, or None if no child is started any more."""
        searching = self._suspects.on_trial and not death.from_outside
        if culprit := self._suspects.blame(self._live.values(), from_outside=death.from_outside):
            self._fail(culprit, EngineFailed("The engine died each time that it ran this request."))
        self._sent.clear()
        self._adding = []
        for live in self._live.values():
            live.interrupted |= live.sent
            live.leave_engine()
        self._unsent = {live.request.id: live for live in self._live.values() if not live.paused}
        progress, self._progressed = self._progressed, False
        return self._policy.after_death(progress=progress, found=culprit is not None, searching=searching)

    def _fail(self, live: LiveRequest, error: EngineError) -> None:
        del self._live[live.request.id]
        self._sent.pop(live.engine_id, None)
        self._unsent.pop(live.request.id, None)
        live.leave_engine()
        live.stream.put(error)


def _loading(progress: Progress) -> Health:
    return Health(alive=True, ready=False, reason="the engine is loading", loading=progress)
