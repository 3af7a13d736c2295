"""Sends a benchmark's requests. In closed loop, a fixed number of clients send them. In open loop, sessions begin at
given times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import numpy as np
from numpy.random import Generator

from jamba_server.server.cli.bench.client import Context, Failure, Message, Record, Reply
from jamba_server.server.cli.bench.sessions import Session, Turn


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed_loop"):
    """A load of `concurrency` clients at the same time. Each client begins a session as soon as its previous session
    has ended."""

    concurrency: int

    def __str__(self) -> str:
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"


class Poisson(msgspec.Struct, frozen=True, tag="poisson"):
    """A load of sessions that begin at random times. On average `request_rate` sessions begin per second.

    A session begins at its time even if earlier sessions are still in flight.
    """

    request_rate: float

    def __str__(self) -> str:
        return f"{self.request_rate:g} req/s"


class Replay(msgspec.Struct, frozen=True, tag="replay"):
    """A load of sessions that begin at the times recorded in a trace file."""

    def __str__(self) -> str:
        return "trace"


Load = ClosedLoop | Poisson | Replay


def poisson_arrivals(rng: Generator, count: int, rate: float) -> list[float]:
    """Draws arrival times in seconds. The first time is 0. The gaps between consecutive times are independent and
    exponentially distributed with mean 1 / rate."""
    gaps = rng.exponential(1 / rate, size=count)
    gaps[:1] = 0
    return np.cumsum(gaps).tolist()


def schedule(load: Load, sessions: list[Session], rng: Generator) -> list[Session]:
    """Gives the sessions of a Poisson load random arrival times. Returns the sessions of any other kind of load
    unchanged."""
    if not isinstance(load, Poisson):
        return sessions
    arrivals = poisson_arrivals(rng, len(sessions), load.request_rate)
    return [Session(session.turns, arrival) for session, arrival in zip(sessions, arrivals, strict=True)]


class Sender(Protocol):
    """What sends one turn. `now` is its clock, in seconds."""

    now: Callable[[], float]

    async def send(self, turn: Turn, context: Context) -> Record: ...


class Runner:
    """Sends the requests of one load. Records the reply to each request, or the reason why no complete reply came.

    `records` holds the requests that have ended, in the order of their ends. The function `on_end` is called at the end
    of each request.
    """

    def __init__(self, client: Sender, on_end: Callable[[], None] = lambda: None) -> None:
        self.records: list[Record] = []
        self._client = client
        self._on_end = on_end
        self._replays = False

    async def run(self, load: Load, sessions: Iterable[Session], *, max_seconds: float) -> None:
        """Sends the requests of `sessions`. Stops when every session has ended, or after `max_seconds`.

        Requests in flight at that time are cancelled and recorded as cut_off. No further requests are sent.
        """
        concurrency = load.concurrency if isinstance(load, ClosedLoop) else None
        self._replays = isinstance(load, Replay)
        work = self._open_loop(sessions) if concurrency is None else self._closed_loop(iter(sessions), concurrency)
        try:
            async with asyncio.timeout(max_seconds):
                await work
        except TimeoutError:
            pass  # reaching the time limit is no error: `records` has a failure for each request that was cut off

    async def _closed_loop(self, sessions: Iterable[Session], concurrency: int) -> None:
        async def client() -> None:
            for session in sessions:  # all clients share this iterator, so no two clients take the same session
                await self._converse(session)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

    async def _open_loop(self, sessions: Iterable[Session]) -> None:
        start = self._client.now()
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                await self._sleep_until(start + session.arrival)
                group.create_task(self._converse(session, start if self._replays else None))

    async def _sleep_until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self._client.now()))

    async def _converse(self, session: Session, replay_start: float | None = None) -> None:
        """Sends the turns of one session in order. With `replay_start`, the time at which the replay of a trace began,
        no turn is sent before its arrival. If a request fails, the session ends, because the next turn of a chat would
        have to contain the missing reply."""
        parents = {turn.parent for turn in session.turns}
        system = (Message("system", session.system),) if session.system else ()
        contexts: list[Context] = []  # the context after each turn
        for number, turn in enumerate(session.turns):
            before = contexts[turn.parent] if turn.parent >= 0 else Context(system, session.tools)
            continues = number in parents and not isinstance(turn.prompt, str)
            before = msgspec.structs.replace(before, continues=continues)
            if replay_start is not None:
                await self._sleep_until(replay_start + turn.arrival)
            start = self._client.now()
            try:
                record = await self._client.send(turn, before)
            except asyncio.CancelledError:
                message = "The request was still running when the time was up."
                self._add(Failure(start=start, end=self._client.now(), kind="cut_off", message=message))
                raise
            self._add(record)
            if not isinstance(record, Reply):
                return
            contexts.append(_after(before, turn, record))

    def _add(self, record: Record) -> None:
        self.records.append(record)
        self._on_end()


def _after(context: Context, turn: Turn, reply: Reply) -> Context:
    """Returns the context of a turn that continues `turn`, which had the context `context`."""
    if isinstance(turn.prompt, str):
        said = (Message("user", turn.prompt), Message("assistant", reply.text))
        return msgspec.structs.replace(context, messages=context.messages + said)
    return msgspec.structs.replace(context, tokens=context.tokens + turn.prompt + reply.token_ids)
