"""Replays conversations on an engine and records what the prefix cache saved.

The clock of a replay is the sum of the times of the steps. It jumps to the next request when the engine has no work. So
a replay takes no longer than its steps, and a simulated engine needs only a formula for the time of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

import numpy as np

from jamba_server.engine.core import EngineCore
from jamba_server.engine.scheduler import ChunkResult, Scheduler, SchedulerOutput
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.server.cli.bench.sessions import Session


class StepWork(NamedTuple):
    """What a step computes: the number of prompt tokens, and the number of sequences that decode one token."""

    prompt_tokens: int
    decodes: int


@dataclass(frozen=True, slots=True)
class Costs:
    """The time of a step in milliseconds: `step` for each step, `prompt_token` for each prompt token, and `decode` for
    each sequence that decodes."""

    step: float
    prompt_token: float
    decode: float

    def seconds(self, work: StepWork) -> float:
        return (self.step + self.prompt_token * work.prompt_tokens + self.decode * work.decodes) / 1000

    @classmethod
    def fit(cls, steps: Sequence[tuple[StepWork, float]]) -> Costs:
        """Fits the costs to measured steps, which are pairs of work and seconds, by least squares."""
        rows = np.array([(1.0, *work) for work, _ in steps])
        milliseconds = np.array([1000 * seconds for _, seconds in steps])
        return cls(*np.linalg.lstsq(rows, milliseconds, rcond=None)[0].tolist())


class Engine(Protocol):
    """An engine that a replay drives."""

    @property
    def has_work(self) -> bool: ...

    def add(self, requests: list[Request], now: float) -> None: ...

    def step(self, now: float) -> tuple[list[TokenUpdate], float]:
        """Runs a step that begins at `now`. Returns its results and how many seconds it took."""
        ...


class Simulated:
    """The real scheduler and cache with a model that computes nothing. The tokens of replies are random numbers, and
    the time of a step follows from `costs`."""

    def __init__(self, scheduler: Scheduler, costs: Costs, *, first_token: int) -> None:
        self.scheduler, self.costs = scheduler, costs
        self._next = first_token  # each reply token is a number that no prompt has and no other reply has

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, requests: list[Request], now: float) -> None:
        self.scheduler.add(requests, now=now)

    def step(self, now: float) -> tuple[list[TokenUpdate], float]:
        output = self.scheduler.schedule(now=now)
        self.scheduler.advance(output)
        results = [ChunkResult((self._token(),)) if chunk.num_sampled else ChunkResult() for chunk in output.chunks]
        return self.scheduler.update(output, results), self.costs.seconds(work_of(output))

    def _token(self) -> int:
        self._next += 1
        return self._next


class Real:
    """A real engine. `steps` records the work of each step and the seconds it took."""

    def __init__(self, core: EngineCore) -> None:
        self.core, self.steps = core, list[tuple[StepWork, float]]()
        self._output: SchedulerOutput | None = None
        launch = core.model_runner.launch

        def recorded(output: SchedulerOutput):  # noqa: ANN202
            self._output = output
            return launch(output)

        core.model_runner.launch = recorded

    @property
    def has_work(self) -> bool:
        return self.core.has_work

    def add(self, requests: list[Request], now: float) -> None:
        del now
        self.core.inbox.submit(requests)

    def step(self, now: float) -> tuple[list[TokenUpdate], float]:
        del now
        start = time.perf_counter()
        updates = self.core.step().updates
        seconds = time.perf_counter() - start
        if self._output is not None:
            self.steps.append((work_of(self._output), seconds))
            self._output = None
        return updates, seconds


def work_of(output: SchedulerOutput) -> StepWork:
    decodes = sum(chunk.is_decode for chunk in output.chunks)
    return StepWork(sum(chunk.end - chunk.start for chunk in output.chunks) - decodes, decodes)


class Outcome(NamedTuple):
    """A request that was answered: its number of prompt tokens, how many of them were cached, and the seconds from the
    request to its first token."""

    prompt_tokens: int
    cached_tokens: int
    ttft: float


@dataclass(slots=True)
class _Run:
    """A request that is in progress. `due` is the time at which it was sent."""

    session: int
    turn: int
    due: float
    prompt: list[int]
    reply: list[int] = field(default_factory=list[int])
    cached: int = 0
    ttft: float = 0.0


class Replay:
    """Sends the turns of `sessions`, each at its arrival or when the previous turn of its session is complete,
    whichever is later."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions, self.outcomes = sessions, list[Outcome]()
        self._due = [(session.arrival, number, 0) for number, session in enumerate(sessions)]  # a heap
        self._due.sort()
        self._runs: dict[str, _Run] = {}
        self._texts: list[list[list[int]]] = [[] for _ in sessions]  # the tokens after each turn of each session

    @property
    def next_due(self) -> float:
        """The time of the next request in seconds, or infinity if no request is known whose turn has come."""
        return self._due[0][0] if self._due else math.inf

    def run(self, engine: Engine) -> list[Outcome]:
        now = 0.0
        while self._due or engine.has_work:
            if not engine.has_work:
                now = max(now, self._due[0][0])
            if requests := list(self.arrived(now)):
                engine.add(requests, now)
            updates, seconds = engine.step(now)
            now += seconds
            for update in updates:
                self.take(update, now)
        return self.outcomes

    def arrived(self, now: float) -> Iterable[Request]:
        """Yields the requests that are due by now."""
        while self._due and self._due[0][0] <= now:
            due, number, index = heappop(self._due)
            turn = self.sessions[number].turns[index]
            assert not isinstance(turn.prompt, str), "a replay sends token ids"
            history = self._texts[number][turn.parent] if turn.parent >= 0 else []
            run = _Run(number, index, due, [*history, *turn.prompt])
            name = f"{number}-{index}"
            self._runs[name] = run
            yield Request(
                id=name,
                prompt=run.prompt,
                params=SamplingParams(max_tokens=turn.max_tokens, temperature=0.0, ignore_eos=True),
                # The server passes the ends of the system prompt and of the history, as the chat template has them.
                save_positions=tuple({turn.system, turn.history} - {0}),
            )

    def take(self, update: TokenUpdate, now: float) -> None:
        """Records what a request got at `now`. If it was the last, the next turn of its session becomes due."""
        run = self._runs[update.request_id]
        if update.token_ids and not run.reply:
            run.ttft = now - run.due
        run.cached = update.num_cached if update.num_cached is not None else run.cached
        run.reply += update.token_ids
        if update.finish_reason is None:
            return
        assert update.finish_reason == "length", f"request {update.request_id} ended with {update.finish_reason}"
        del self._runs[update.request_id]
        self.outcomes.append(Outcome(len(run.prompt), run.cached, run.ttft))
        self._texts[run.session].append(run.prompt + run.reply)
        turns = self.sessions[run.session].turns
        if (following := run.turn + 1) < len(turns):
            heappush(self._due, (max(now, turns[following].arrival), run.session, following))


class Summary(NamedTuple):
    """The share of prompt tokens that were cached, and percentiles of the time to first token in seconds."""

    hit_rate: float
    p50: float
    p95: float


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    cached, prompts = sum(o.cached_tokens for o in outcomes), sum(o.prompt_tokens for o in outcomes)
    p50, p95 = np.percentile([o.ttft for o in outcomes], (50, 95)).tolist()
    return Summary(cached / prompts, p50, p95)
