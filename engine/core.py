"""EngineCore: everything that runs in the engine process, and the one function that is the engine: `step`."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from jamba_server.engine.model_runner import ModelRunner, PendingStep
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import EngineInfo, Request, StepResult, TokenUpdate


class Inbox:
    """Requests and aborts on their way to the next step. The only part of the engine that other threads touch."""

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
            # one that the scheduler has not seen yet must never reach it
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
        """Blocks until something arrives."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._aborted)

    def wake(self) -> None:
        """Ends a `wait` for good: an abort of nothing."""
        self.abort([""])


class EngineCore:
    """Steps what `engine.start.build` made."""

    def __init__(self, model_runner: ModelRunner, scheduler: Scheduler, info: EngineInfo) -> None:
        self.model_runner, self.scheduler, self.info = model_runner, scheduler, info
        self.inbox = Inbox()
        self._under_way: PendingStep | None = None
        self._is_whole = True  # False while a step is made, and after one that was not discarded to the end

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._under_way is not None

    def step(self) -> StepResult:
        """Takes in what arrived, launches one batch, and says what came of it; of the one before, where the runner
        keeps the tokens that the next batch needs.

        If it raises, whatever it raises, the requests that had begun are gone, with all that no earlier step has
        confirmed; steps after it are right."""
        with self._whole_or_discarded():
            last, self._under_way = self._under_way, None
            updates: list[TokenUpdate] = []
            self.scheduler.abort(self.inbox.aborted())  # before anything is said of them
            if last is not None and self.scheduler.must_wait():
                updates += self._take(last)
                last = None
            self.scheduler.add(self.inbox.submitted(), now=time.monotonic())
            output = self.scheduler.schedule(now=time.monotonic())
            if output.chunks:
                self._under_way = self.model_runner.launch(output)
                self.scheduler.advance(output)
            if last is not None:
                updates += self._take(last)
            elif self._under_way is not None and self.model_runner.sampled is None:
                updates += self._take(self._under_way)
                self._under_way = None
            return StepResult(updates, list(output.started), self.scheduler.stats)

    def _take(self, step: PendingStep) -> list[TokenUpdate]:
        """Waits for a step's results and takes them in."""
        return self.scheduler.update(step.output, step.results())

    @contextmanager
    def _whole_or_discarded(self) -> Generator[None]:
        """A step that ends early is discarded: at once, or before the next one if an interrupt ends that early, too."""
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
        self._under_way = None
        self.scheduler.discard()
        self._is_whole = True
