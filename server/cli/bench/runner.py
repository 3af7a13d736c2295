"""Sends sessions to the server in closed loop (so many clients) or in open loop (at given times)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
from numpy.random import Generator

from jamba_server.server.cli.bench.client import Client, Failure, Message, Record, Reply
from jamba_server.server.cli.bench.workloads import Session


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed_loop"):
    """So many clients, each of which begins its next session when the last one is over."""

    concurrency: int

    def __str__(self) -> str:
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"


class Poisson(msgspec.Struct, frozen=True, tag="poisson"):
    """Sessions begin at random times, `request_rate` a second on average, whether or not others are over."""

    request_rate: float

    def __str__(self) -> str:
        return f"{self.request_rate:g} req/s"


class Replay(msgspec.Struct, frozen=True, tag="replay"):
    """Sessions begin at the times that their trace has."""

    def __str__(self) -> str:
        return "trace"


Load = ClosedLoop | Poisson | Replay


def poisson_arrivals(rng: Generator, count: int, rate: float) -> list[float]:
    """Seconds, the first at 0, with independent exponential gaps of mean 1 / rate."""
    gaps = rng.exponential(1 / rate, size=count)
    gaps[:1] = 0
    return np.cumsum(gaps).tolist()


def schedule(load: Load, sessions: list[Session], rng: Generator) -> list[Session]:
    """The sessions at the times that `load` gives them; in closed loop they have none."""
    if not isinstance(load, Poisson):
        return sessions
    arrivals = poisson_arrivals(rng, len(sessions), load.request_rate)
    return [Session(session.turns, arrival) for session, arrival in zip(sessions, arrivals, strict=True)]


class Runner:
    """One measurement. `records` grow as requests end, in that order; `on_end` is called for each."""

    def __init__(self, client: Client, on_end: Callable[[], None] = lambda: None) -> None:
        self.records: list[Record] = []
        self._client = client
        self._on_end = on_end

    async def run(self, load: Load, sessions: Iterable[Session], *, max_seconds: float) -> None:
        """At `max_seconds` what still runs is ended and recorded as cut_off, and nothing more is sent."""
        concurrency = load.concurrency if isinstance(load, ClosedLoop) else None
        work = self._open_loop(sessions) if concurrency is None else self._closed_loop(iter(sessions), concurrency)
        try:
            async with asyncio.timeout(max_seconds):
                await work
        except TimeoutError:
            pass  # the records say what was cut off

    async def _closed_loop(self, sessions: Iterable[Session], concurrency: int) -> None:
        async def client() -> None:
            for session in sessions:  # one iterator for all clients: each takes the next session
                await self._converse(session)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())

    async def _open_loop(self, sessions: Iterable[Session]) -> None:
        start = self._client.now()
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                await asyncio.sleep(max(0.0, start + session.arrival - self._client.now()))
                group.create_task(self._converse(session))

    async def _converse(self, session: Session) -> None:
        """A failure ends the session: a chat cannot go on without the reply."""
        history: list[Message] = []
        for turn in session.turns:
            start = self._client.now()
            try:
                record = await self._client.send(turn, history)
            except asyncio.CancelledError:
                message = "It was still running when the time was up."
                self._add(Failure(start=start, end=self._client.now(), kind="cut_off", message=message))
                raise
            self._add(record)
            if not isinstance(record, Reply):
                return
            if isinstance(turn.prompt, str):
                history += [Message("user", turn.prompt), Message("assistant", record.text)]

    def _add(self, record: Record) -> None:
        self.records.append(record)
        self._on_end()
