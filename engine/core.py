"""EngineCore: lets the scheduler plan each step and the model runner execute it. The method `EngineCore.step` runs one
step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from jamba_server.engine.model_runner import ModelRunner, PendingStep
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import Adding, EngineInfo, Request, Starting, StepResult, TokenUpdate


class Inbox:
    """Holds new requests, and the ids of requests to abort, until the next step of the engine takes them. The inbox is
    the only part of the engine that other threads may use."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._submitted: dict[str, Request] = {}
        self._aborted: list[str] = []

    def submit(self, requests: list[Request]) -> None:
        with self._changed:
            self._submitted.update((request.id, request) for request in requests)
            self._changed.notify()

    def abort(self, request_ids: list[str]) -> None:
        with self._changed:
            # An aborted request that is still in the inbox is removed from the inbox, so the scheduler never sees that
            # request.
            self._aborted += [i for i in request_ids if self._submitted.pop(i, None) is None]
            self._changed.notify()

    def submitted(self) -> list[Request]:
        with self._changed:
            requests, self._submitted = list(self._submitted.values()), {}
        return requests

    def aborted(self) -> list[str]:
        with self._changed:
            request_ids, self._aborted = self._aborted, []
        return request_ids

    def wait(self) -> None:
        """Blocks until a request or an abort arrives."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._aborted)

    def wake(self) -> None:
        """Wakes a thread that is blocked in the method `wait`."""
        self.abort([""])  # no request has the id "", so this call aborts nothing and only wakes a thread in `wait`


class EngineCore:
    """The engine: it runs steps with a scheduler and a model runner, which `engine.start.build` makes. `announce` is
    called before new requests are added to the queue, and before a step in which requests run for the first time."""

    def __init__(self, model_runner: ModelRunner, scheduler: Scheduler, info: EngineInfo) -> None:
        self.model_runner, self.scheduler, self.info = model_runner, scheduler, info
        self.announce: Callable[[Adding | Starting], None] = lambda message: None
        self.inbox = Inbox()
        self._in_flight: PendingStep | None = None  # a launched step whose results have not been read
        self._is_whole = True  # False from the start of a step until that step is finished or completely discarded

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def step(self) -> StepResult:
        """Takes new requests and aborts from the inbox, launches a step, and returns the results of one step. With
        asynchronous scheduling this is the step that the previous call launched. Otherwise this is the step that the
        present call launches.

        If anything raises here, an interrupt included, all requests that had begun are dropped, and so are the cache
        entries that no earlier step has confirmed. Later steps work normally."""
        with self._whole_or_discarded():
            last, self._in_flight = self._in_flight, None
            updates: list[TokenUpdate] = []
            self.scheduler.abort(self.inbox.aborted())  # aborts come first, so that aborted requests get no update
            if last is not None and self.scheduler.must_wait():
                updates += self._take(last)
                last = None
            if submitted := self.inbox.submitted():
                self.announce(Adding([request.id for request in submitted]))
                self.scheduler.add(submitted, now=time.monotonic())
            output = self.scheduler.schedule(now=time.monotonic())
            if output.started:
                self.announce(Starting(list(output.started)))
            if output.chunks:
                self._in_flight = self.model_runner.launch(output)
                self.scheduler.advance(output)
            if last is not None:
                updates += self._take(last)
            elif self._in_flight is not None and self.model_runner.sampled is None:
                updates += self._take(self._in_flight)
                self._in_flight = None
            return StepResult(updates, self.scheduler.stats)

    def _take(self, step: PendingStep) -> list[TokenUpdate]:
        """Waits for the results of a step, gives the results to the scheduler, and returns the updates for the step's
        requests."""
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
        self._in_flight = None
        self.scheduler.discard()
        self._is_whole = True
