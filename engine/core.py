"""EngineCore: lets the scheduler plan each step and the model runner execute it. The method `EngineCore.step` runs one
step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from jamba_server.engine.cache.explain import record_restores
from jamba_server.engine.cache.tiers.events import Event
from jamba_server.engine.grammar.compiler import GrammarCompiler, GrammarError
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.launched_step import LaunchedStep
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.scheduler import Scheduler, SchedulerOutput
from jamba_server.engine.types import Adding, EngineInfo, Request, Starting, StepKind, StepResult, StepTime, TokenUpdate


class Submitted(NamedTuple):
    """A new request together with its `Constraint` object, which says which tokens the reply may have. The constraint
    is None if the request has no grammar."""

    request: Request
    constraint: Constraint | None = None


class Inbox:
    """Holds new requests, and the ids of requests to abort, until the next step of the engine takes them. The inbox is
    the only part of the engine that other threads may use.

    A request with a grammar is held back until `compiler` has compiled the grammar. Without a compiler, such requests
    must not be submitted.

    The inbox also measures how long pins of the prefix cache last, because neither the scheduler nor the cache reads a
    clock. `clock` returns seconds.
    """

    def __init__(self, compiler: GrammarCompiler | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.compiler, self._clock = compiler, clock
        self._pin_ends: dict[str, float] = {}  # maps the name of each pin to the time when it ends
        self._changed = threading.Condition()
        self._compiling: dict[str, Request] = {}
        self._submitted: dict[str, Submitted] = {}
        self._failed: list[TokenUpdate] = []
        self._aborted: list[str] = []
        self._events: list[Event] = []

    def submit(self, requests: list[Request]) -> None:
        with self._changed:
            for request in requests:
                if request.params.grammar:
                    self._compiling[request.id] = request
                else:
                    self._submitted[request.id] = Submitted(request)
            self._changed.notify()
        for request in requests:
            if request.params.grammar:
                assert self.compiler is not None, "an inbox without a compiler got a grammar"
                self.compiler.start(request, partial(self._compiled, request), partial(self._awaits, request))

    def _awaits(self, request: Request) -> bool:
        """Returns whether a request still waits for its grammar to be compiled. The compiler's thread calls this
        method."""
        with self._changed:
            return self._compiling.get(request.id) is request

    def _compiled(self, request: Request, result: Constraint | GrammarError) -> None:
        """Stores the result of compiling a request's grammar, so that the next step can start the request. The
        compiler's thread calls this method."""
        with self._changed:
            if self._compiling.get(request.id) is not request:
                return  # the request was aborted while its grammar was being compiled
            del self._compiling[request.id]
            if isinstance(result, GrammarError):
                self._failed.append(TokenUpdate(request_id=request.id, finish_reason="error", error=str(result)))
            else:
                self._submitted[request.id] = Submitted(request, result)
            self._changed.notify()

    def abort(self, request_ids: list[str]) -> None:
        with self._changed:
            # An aborted request that is still in the inbox is removed from the inbox, so the scheduler never sees that
            # request.
            for request_id in request_ids:
                held = self._submitted.pop(request_id, None) or self._compiling.pop(request_id, None)
                if held is None:
                    self._aborted.append(request_id)
                else:
                    self._drop(request_id)
            self._changed.notify()

    def _drop(self, request_id: str) -> None:
        """Called with the id of a request that was aborted before a step took it."""

    def begin_step(self) -> None:
        """Called before a step takes anything. Where several ranks run the same steps, this decides what all of them
        take."""

    @property
    def has_submitted(self) -> bool:
        """Returns whether new requests are ready for the next step."""
        with self._changed:
            return bool(self._submitted)

    def submitted(self) -> list[Submitted]:
        """Returns the new requests, and removes them from the inbox."""
        with self._changed:
            submitted, self._submitted = list(self._submitted.values()), {}
        return submitted

    def failed(self) -> list[TokenUpdate]:
        """Returns the updates that end the requests whose grammars could not be compiled, and removes them from the
        inbox."""
        with self._changed:
            updates, self._failed = self._failed, []
        return updates

    def pinned(self, pins: Iterable[tuple[str, float]]) -> None:
        """Begins to measure the time of new pins. Each of `pins` is (name, number of seconds that the pin lasts)."""
        now = self._clock()
        self._pin_ends.update({name: now + seconds for name, seconds in pins})

    def ended_pins(self) -> list[str]:
        """Returns the names of the pins that have ended, and removes them from the inbox."""
        if not self._pin_ends:
            return []
        now = self._clock()
        ended = [name for name, end in self._pin_ends.items() if end <= now]
        for name in ended:
            del self._pin_ends[name]
        return ended

    def aborted(self) -> list[str]:
        with self._changed:
            request_ids, self._aborted = self._aborted, []
        return request_ids

    def post(self, event: Event) -> None:
        """Takes what a thread of the prefix cache's disk tier has done."""
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def events(self) -> list[Event]:
        """Returns what the threads of the disk tier have done, and removes it from the inbox."""
        with self._changed:
            events, self._events = self._events, []
        return events

    def wait(self) -> None:
        """Blocks until there is a request to run, a request that failed, an abort, or an event of the disk tier."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._failed or self._aborted or self._events)

    def wake(self) -> None:
        """Wakes a thread that is blocked in the method `wait`."""
        self.abort([""])  # no request has the id "", so this call aborts nothing and only wakes a thread in `wait`


class EngineCore:
    """The engine: it runs steps with a scheduler and a model runner, which `engine.start.build` makes. The function
    `announce` is called before new requests are added to the queue, and before a step in which requests run for the
    first time. It tells the parent process which requests may be the cause if this process dies."""

    def __init__(
        self,
        model_runner: ModelRunner,
        scheduler: Scheduler,
        info: EngineInfo,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self.model_runner, self.scheduler, self.info = model_runner, scheduler, info
        self.announce: Callable[[Adding | Starting], None] = lambda message: None
        self.inbox = Inbox(compiler)
        # The steps that were launched and whose results have not been read yet, the oldest first.
        self._in_flight: deque[LaunchedStep] = deque()
        # The kind of the step whose results the present call of `step` has read, or None if it has read none.
        self._kind: StepKind | None = None
        # This flag is false from the start of a step until that step is finished or completely discarded.
        self._is_whole = True

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> StepResult:
        """Takes new requests and aborts from the inbox, launches a step, and returns the results of one step, or of
        none. With asynchronous scheduling this is the step that the previous call launched. In a pipeline of stages it
        is the oldest step, if one is launched for each stage or none can be launched. Otherwise it is the step that
        the present call launches.

        If anything raises here, an interrupt included, all requests that had begun are dropped, and so are the cache
        entries that no earlier step has confirmed. Later steps work normally."""
        if not self._in_flight and only_restores(self.scheduler):
            self.inbox.wait()
        began = time.monotonic()
        with self._whole_or_discarded():
            self._kind = None
            self.inbox.begin_step()
            pins = self.scheduler.cache.pins
            for event in self.inbox.events():
                self.scheduler.cache.take(event)
            updates: list[TokenUpdate] = []
            aborted = self.inbox.aborted()
            for name in (*self.inbox.ended_pins(), *aborted):
                pins.release(name)
            self.scheduler.abort(aborted)  # aborts come first, so that aborted requests get no update
            runs_ahead = self.model_runner.sampled is not None
            if runs_ahead and self._in_flight and self.scheduler.must_wait():
                updates += self._take()
            updates += self.inbox.failed()
            if submitted := self.inbox.submitted():
                self._add(submitted)
            output = self.scheduler.schedule(now=time.monotonic())
            if output.started:
                self.announce(Starting(list(output.started)))
            if output.chunks or output.copies:
                self._in_flight.append(launched := self.model_runner.launch(output))
                record_restores(output.chunks, launched.restore_seconds)
                self.scheduler.advance(output)
            most = max(runs_ahead, self.model_runner.num_stages - 1) if output.chunks else 0
            if len(self._in_flight) > most:
                updates += self._take()
            self.inbox.pinned(pins.take_new())
            kind, seconds = self._kind, time.monotonic() - began
            return StepResult(updates, self.scheduler.stats, StepTime(kind, seconds) if kind else None)

    def close(self, timeout: float) -> None:
        """Ends the engine: saves the states of running sequences, and waits up to `timeout` seconds until everything
        that the next engine may use is written to the disk tier. Requests end without an update."""
        with self._whole_or_discarded():
            while self._in_flight:
                self._take()
            self.scheduler.park()
        self.scheduler.cache.close(timeout)

    def _add(self, submitted: list[Submitted]) -> None:
        self.announce(Adding([new.request.id for new in submitted]))
        constraints = {new.request.id: new.constraint for new in submitted if new.constraint is not None}
        self.scheduler.add([new.request for new in submitted], now=time.monotonic(), constraints=constraints)

    def _take(self) -> list[TokenUpdate]:
        """Waits for the results of the oldest step in flight, gives the results to the scheduler, and returns the
        updates for the step's requests."""
        step = self._in_flight.popleft()
        if step.output.chunks:
            self._kind = kind_of(step.output)
        return self.scheduler.update(step.output, step.results())

    @contextmanager
    def _whole_or_discarded(self) -> Generator[None]:
        """Context manager: if the `with` block, which runs a step, raises an exception, the step is discarded. If an
        interrupt stops `_discard` halfway, the next step calls `_discard` again before it does anything else."""
        if not self._is_whole:
            self._discard()
        self._is_whole = False
        try:
            yield
        except BaseException:
            self._discard()
            raise
        self._is_whole = True

    def _discard(self) -> None:
        self._in_flight.clear()
        self.scheduler.discard()
        self._is_whole = True


def only_restores(scheduler: Scheduler) -> bool:
    """Returns whether nothing can run before a prefix has been read from a disk."""
    return scheduler.cache.is_restoring and not scheduler.running and all(seq.restoring for seq in scheduler.waiting)


def kind_of(step: SchedulerOutput) -> StepKind:
    """Returns what a step computes. Chunks that decode come before all other chunks of the step."""
    if not step.chunks[0].is_decode:
        return "prefill"
    return "decode" if step.chunks[-1].is_decode else "mixed"
