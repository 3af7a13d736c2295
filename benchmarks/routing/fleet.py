"""A discrete-event simulation of several engines behind one front end. Each engine is the real scheduler and the real
prefix cache with a simulated model (`benchmarks.cache.replay`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.cache.replay import Engine, Outcome, Replay
from benchmarks.routing.policies import Policy
from jamba_server.engine.replicas.routing import Work
from jamba_server.engine.types import TokenUpdate


@dataclass(slots=True)
class _Member:
    """An engine. The step that runs ends at `until` with `updates`; infinity stands for no step. `waiting` has the
    requests without an update yet, with the tokens that they probably miss, and `started` the others that are open."""

    engine: Engine
    until: float = math.inf
    updates: list[TokenUpdate] = field(default_factory=list[TokenUpdate])
    waiting: dict[str, int] = field(default_factory=dict[str, int])
    started: set[str] = field(default_factory=set[str])
    num_prompt_tokens: int = 0

    @property
    def work(self) -> Work:
        return Work(sum(self.waiting.values()), len(self.started))


class Fleet:
    """Sends the requests of a replay to engines that run at the same time, each with its own steps. A step that ends at
    a time comes before the requests of that time."""

    def __init__(self, engines: Sequence[Engine], policy: Policy) -> None:
        self._members, self._policy = [_Member(engine) for engine in engines], policy

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt tokens that each engine was sent, cached ones included."""
        return [member.num_prompt_tokens for member in self._members]

    def run(self, replay: Replay) -> list[Outcome]:
        now = 0.0
        while True:
            for member in self._members:
                if member.until <= now:
                    self._end(member, replay)
            for request in replay.arrived(now):
                number, missing = self._policy.choose(request, [member.work for member in self._members])
                member = self._members[number]
                member.engine.add([request], now)
                member.waiting[request.id] = missing
                member.num_prompt_tokens += len(request.prompt)
            for member in self._members:
                if math.isinf(member.until) and member.engine.has_work:
                    member.updates, seconds = member.engine.step(now)
                    member.until = now + seconds
            now = min(replay.next_due, *(member.until for member in self._members))
            if math.isinf(now):
                return replay.outcomes

    def _end(self, member: _Member, replay: Replay) -> None:
        """Hands out what a step has computed, at the time at which it ended."""
        for update in member.updates:
            replay.take(update, member.until)
            if member.waiting.pop(update.request_id, None) is not None:
                member.started.add(update.request_id)
            if update.finish_reason:
                member.started.discard(update.request_id)
        member.updates, member.until = [], math.inf
