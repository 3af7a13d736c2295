"""Supervision of the engine process, with scripted engines that die and hang on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead, EngineFailed, EngineLoading, Overloaded, RequestRejected
from jamba_server.engine.process.client import EngineClient, Health
from jamba_server.engine.types import Progress, Request, SamplingParams, TokenUpdate

COMMAND = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))


def request(name: str, *, prompt: int = 1, tokens: int = 5) -> Request:
    return Request(id=name, prompt=[prompt], params=SamplingParams(max_tokens=tokens))


def client(*, timeout: float = 60.0, max_queue: int = 0, model: str = "any") -> EngineClient:
    return EngineClient(
        EngineConfig(model=model), engine_timeout=timeout, max_queue_requests=max_queue, command=COMMAND
    )


@pytest.fixture
async def running() -> AsyncIterator[EngineClient]:
    engine = client()
    await engine.start()
    yield engine
    await engine.close()


async def collect(engine: EngineClient, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    async with engine.generate(requests) as updates:
        async for update in updates:
            tokens[update.request_id] += update.token_ids
    return tokens


def expected(tokens: int) -> list[int]:
    return [1001 + i for i in range(tokens)]


async def test_updates_of_several_choices(running: EngineClient) -> None:
    assert await collect(running, [request("a", tokens=2), request("b", tokens=4)]) == {
        "a": expected(2),
        "b": expected(4),
    }


async def test_leaving_early_ends_the_request_in_the_engine(running: EngineClient) -> None:
    async with running.generate([request("a", tokens=10**6)]) as updates:
        await anext(updates)
        assert running.stats.num_running == 1
    async with running.generate([request("b", tokens=3)]) as updates:
        seen = [u async for u in updates]
    assert {u.request_id for u in seen} == {"b"}
    assert running.stats.num_running == 0


async def test_one_choice_can_end_while_its_sibling_goes_on(running: EngineClient) -> None:
    async with running.generate([request("a", tokens=10**6), request("b", tokens=30)]) as updates:
        after: list[TokenUpdate] = []
        async for update in updates:
            if update.request_id == "a":
                updates.abort("a")
                updates.abort("a")
            after.append(update)
    assert sum(u.request_id == "a" for u in after) == 1
    assert sum(u.request_id == "b" for u in after) == 30


async def test_a_kind_that_no_engine_serves_is_refused(running: EngineClient) -> None:
    with pytest.raises(RequestRejected, match="kind is 'embed'"):
        async with running.generate([msgspec.structs.replace(request("a", tokens=1), kind="embed")]):
            pass
    assert await collect(running, [request("a", tokens=2)]), "it left nothing behind"


async def test_a_killed_engine_is_replaced_and_every_token_comes_once(running: EngineClient) -> None:
    first = running.pid
    tokens: list[int] = []
    cached: list[int] = []
    async with running.generate([request("a", tokens=200)]) as updates:
        async for update in updates:
            tokens += update.token_ids
            cached += [] if update.num_cached is None else [update.num_cached]
            if len(tokens) == 20:
                assert first is not None
                os.kill(first, signal.SIGKILL)
    assert tokens == expected(200)
    assert cached == [3], "what comes once a request comes once"
    assert running.pid != first
    assert running.stats.num_steps_total > 200 - 20, "counters go on"


async def test_a_request_that_kills_every_engine_fails_and_the_others_live(running: EngineClient) -> None:
    good = asyncio.create_task(collect(running, [request("good", tokens=2000)]))
    with pytest.raises(EngineFailed, match="3 times in a row because of this request"):
        await collect(running, [request("bad", prompt=666)])
    assert await good == {"good": expected(2000)}
    assert running.health.ready


async def test_deaths_that_a_failed_request_explains_do_not_count_against_the_engine(running: EngineClient) -> None:
    good = asyncio.create_task(collect(running, [request("good", tokens=2000)]))
    bad = [asyncio.create_task(collect(running, [request(f"bad {i}", prompt=666)])) for i in range(2)]
    for task in bad:
        with pytest.raises(EngineFailed):
            await task
    assert await good == {"good": expected(2000)}


async def test_a_request_that_cannot_be_sent_leaves_nothing_behind(running: EngineClient) -> None:
    with pytest.raises(OverflowError):
        await collect(running, [Request(id="a", prompt=[1], params=SamplingParams(), priority=2**70)])
    assert await collect(running, [request("a", tokens=2)]) == {"a": expected(2)}


async def test_a_request_that_outgrew_the_engine_fails_alone(running: EngineClient) -> None:
    prompt = [1] * (running.info.max_model_len + 1)
    with pytest.raises(EngineFailed, match="a context of 4096 tokens; this request has 4097 tokens"):
        await collect(running, [Request(id="a", prompt=prompt, params=SamplingParams())])
    assert await collect(running, [request("b", tokens=2)]) == {"b": expected(2)}


async def test_an_innocent_request_survives_two_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", str(tmp_path / "mark"))
    engine = client()
    await engine.start()
    assert await collect(engine, [request("once", prompt=667, tokens=9)]) == {"once": expected(9)}
    await engine.close()


async def test_three_deaths_end_it_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.client.DEATH_WINDOW_SECONDS", 3600.0)
    engine = client()
    await engine.start()
    killed: set[int] = set()
    while engine.health.alive:
        if engine.health.ready and engine.pid is not None and engine.pid not in killed:
            killed.add(engine.pid)
            os.kill(engine.pid, signal.SIGKILL)
        await asyncio.sleep(0.01)
    assert len(killed) == 3
    assert engine.health.reason == "the engine process ended with signal 9, the third time within 3600 s"
    with pytest.raises(EngineDead, match="third time"):
        await collect(engine, [request("late")])
    await engine.close()


async def test_an_engine_that_cannot_load_again_is_given_up_however_slowly_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("jamba_server.engine.process.client.DEATH_WINDOW_SECONDS", 0.0)
    engine = client(model="loads once")
    await engine.start()
    async with asyncio.timeout(30):
        with pytest.raises(EngineDead, match="the third time in a row, now while loading"):
            await collect(engine, [request("bad", prompt=666)])
    await engine.close()


async def test_an_engine_that_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    engine = EngineClient(EngineConfig(model="any"), command=(str(tmp_path / "missing"),))
    async with asyncio.timeout(30):
        with pytest.raises(ConfigError, match=r"cannot be started: .*No such file"):
            await engine.start()
    await engine.close()


async def test_an_engine_that_hangs_is_killed() -> None:
    engine = client(timeout=0.3)
    await engine.start()
    with pytest.raises((EngineDead, EngineFailed)):
        await collect(engine, [request("hang", prompt=555)])
    await engine.close()


async def test_before_it_is_ready_it_says_so() -> None:
    engine = client()
    with pytest.raises(EngineLoading, match="loading"):
        _ = engine.info
    assert not engine.health.ready


async def test_a_full_queue_is_refused() -> None:
    engine = client(max_queue=2)
    await engine.start()
    async with engine.generate([request("a"), request("b")]):
        with pytest.raises(Overloaded, match="limit"):
            async with engine.generate([request("c")]):
                pass
    async with engine.generate([request("d")]):
        with pytest.raises(Overloaded, match=r"1 choices are waiting and the request has 2; the limit .* is 2"):
            async with engine.generate([request("e"), request("f")]):
                pass
    with pytest.raises(RequestRejected, match=r"asks for 3 choices; the limit .* is 2"):  # it would never be admitted
        async with engine.generate([request(name) for name in "ghi"]):
            pass
    await engine.close()


async def test_a_model_that_cannot_be_loaded_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="the model is broken"):
        await client(model="broken").start()


async def test_closing_fails_what_still_runs() -> None:
    engine = client()
    await engine.start()
    async with engine.generate([request("a", tokens=10**6)]) as updates:
        await anext(updates)
        await engine.close()
        with pytest.raises(EngineDead):
            [update async for update in updates]


async def test_health_follows_the_first_start_and_no_later_one() -> None:
    seen: list[Health] = []
    engine = EngineClient(
        EngineConfig(model="any"), command=COMMAND, on_progress=lambda phase, fraction: seen.append(engine.health)
    )
    assert engine.health.loading == Progress("starting the engine", 0.0)
    waiting = asyncio.create_task(engine.first_start())
    await engine.start()
    await waiting
    assert [health.loading for health in seen] == [Progress("loading weights", 0.5)]
    assert engine.health == Health(alive=True, ready=True)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await collect(engine, [request("a")])
    assert [health.loading for health in seen[1:]] == [None]
    await engine.close()


async def test_who_waits_for_an_engine_that_cannot_load_learns_it() -> None:
    engine = client(model="broken")
    waiting = asyncio.create_task(engine.first_start())
    with pytest.raises(ConfigError):
        await engine.start()
    await waiting
    with pytest.raises(EngineDead, match="the model is broken"):
        _ = engine.info
