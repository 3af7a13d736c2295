"""Requests whose time limit would expire in the queue are refused at once."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from jamba_server.engine.types import EngineStats, Request, SamplingParams, TokenUpdate
from jamba_server.server.http.deadlines import TimeLimit
from jamba_server.server.http.limits.forecast import MAX_AGE_SECONDS, Ahead, DeadlineUnreachable, Forecast
from jamba_server.server.http.limits.waiting import Admission, WaitingTokens
from tests.server.conftest import Bench, chat


class Load:
    """A clock, and the engine's statistics."""

    def __init__(self) -> None:
        self.now, self.stats = 100.0, EngineStats(num_waiting=1000)
        self.forecast = Forecast(lambda: self.stats, lambda: self.now)

    def run(self, *, seconds: float, choices_per_second: int, tokens: int) -> None:
        for _ in range(int(seconds * choices_per_second) + 1):
            self.forecast.first_token(tokens)
            self.now += 1 / choices_per_second


@pytest.fixture
def load() -> Load:
    return Load()


def test_the_rate_is_measured_while_choices_wait(load: Load) -> None:
    load.run(seconds=8, choices_per_second=4, tokens=100)
    assert load.forecast.seconds(Ahead(40, 4000)) == pytest.approx(10)
    assert load.forecast.seconds(Ahead(40, 40_000)) == pytest.approx(100)  # longer prompts take longer
    load.stats = EngineStats(num_waiting=20)  # the others run already
    assert load.forecast.seconds(Ahead(40, 4000)) == pytest.approx(5)


def test_nothing_is_predicted_without_a_queue_or_measurements(load: Load) -> None:
    assert load.forecast.seconds(Ahead(999, 99_999)) == 0
    load.stats = EngineStats()
    load.run(seconds=20, choices_per_second=1, tokens=100)  # not the engine limits this rate
    load.stats = EngineStats(num_waiting=1000)
    assert load.forecast.seconds(Ahead(999, 99_999)) == 0
    load.run(seconds=8, choices_per_second=4, tokens=100)
    assert load.forecast.seconds(Ahead(999, 99_999)) > 0
    load.now += MAX_AGE_SECONDS + 1
    assert load.forecast.seconds(Ahead(999, 99_999)) == 0


def test_the_fastest_window_counts(load: Load) -> None:
    load.run(seconds=10, choices_per_second=2, tokens=100)
    load.run(seconds=3, choices_per_second=10, tokens=100)
    load.run(seconds=10, choices_per_second=2, tokens=100)
    assert load.forecast.seconds(Ahead(100, 0)) == pytest.approx(10, rel=0.2)


def test_only_what_clearly_cannot_be_met_is_refused(load: Load) -> None:
    load.run(seconds=8, choices_per_second=4, tokens=100)
    load.forecast.check(Ahead(40, 4000), seconds_left=5.01)  # predicted are 10 s
    with pytest.raises(DeadlineUnreachable, match=r"40 choices are ahead .* about 10.0 s") as caught:
        load.forecast.check(Ahead(40, 4000), seconds_left=2)
    assert caught.value.retry_after == 3
    with pytest.raises(DeadlineUnreachable) as caught:
        load.forecast.check(Ahead(1000, 100_000), seconds_left=2)
    assert caught.value.retry_after == 60


def requests(id_: str, length: int, **fields: Any) -> list[Request]:
    return [Request(id=id_, prompt=[5] * length, params=SamplingParams(), **fields)]


async def test_what_counts_as_ahead(load: Load) -> None:
    load.run(seconds=8, choices_per_second=4, tokens=100)
    waiting = WaitingTokens(0, load.forecast)

    def enter(request: list[Request], seconds: float | None = None) -> Admission:
        end = None if seconds is None else TimeLimit(asyncio.get_running_loop().time() + seconds, seconds)
        return Admission(request, waiting, None, end).__enter__()

    first = [enter(requests(f"r{i}", 10)) for i in range(40)]
    with pytest.raises(DeadlineUnreachable, match="40 choices"):
        enter(requests("same", 10), 1)
    enter(requests("short", 9), 1)  # shorter prompts are preferred,
    enter(requests("urgent", 10, priority=-1), 1)  # and more urgent ones,
    enter(requests("other", 10, tenant="other"), 1)  # and keys take turns
    for number, admission in enumerate(first[:30]):
        admission.count(TokenUpdate(request_id=f"r{number}", token_ids=[7]))
    enter(requests("later", 10), 3)  # 12 are ahead: 3 s are predicted
    load.stats = msgspec.structs.replace(load.stats, prefix_queries_total=100, prefix_hits_total=50)
    enter(requests("cached", 10), 0.1)
    for admission in first:
        admission.__exit__(None, None, None)
    assert waiting.num_choices == 5


async def test_the_refusal_reaches_the_client(bench: Bench) -> None:
    forecast: Any = bench.app.state.services.edge.waiting._forecast
    bench.engine.stats = EngineStats(num_waiting=100)
    load = Load()
    forecast._clock = lambda: load.now
    load.forecast = forecast
    load.run(seconds=8, choices_per_second=1, tokens=1)
    bench.engine.limit = 0
    async with bench.http() as http:
        running = asyncio.create_task(http.post("/v1/chat/completions", json=chat(n=20)))
        await bench.engine.stalled.wait()
        refused = await http.post("/v1/chat/completions", json=chat(timeout=2))
        stream = await http.post("/v1/chat/completions", json=chat(stream=True), headers={"X-Request-Timeout": "2"})
        bench.engine.resume.set()
        assert (await running).status_code == 200
    for reply in (refused, stream):
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "deadline_unreachable")
        assert reply.headers["retry-after"] == "9"
    assert len(bench.engine.requests) == 20
