"""Several engine processes behind one client, with scripted engines that die on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead, EngineLoading
from jamba_server.engine.replicas.engines import Engines
from jamba_server.engine.types import Request, TokenUpdate
from tests.engine.scripted_engine import INFO
from tests.engine.test_client import COMMAND, expected, request, until

pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.restarts.BACKOFF_SECONDS", 0.0)


def engines(model: str = "any", number: int = 2) -> Engines:
    return Engines(EngineConfig(model=model, threads=1), number, command=COMMAND)


@pytest.fixture
async def running() -> AsyncIterator[Engines]:
    both = engines()
    await both.start()
    yield both
    await both.close()


async def collect(both: Engines, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    async with both.generate(requests) as updates:
        async for update in updates:
            tokens[update.request_id] += update.token_ids
    return tokens


def routed(both: Engines) -> list[int]:
    return [sum(reasons.values()) for reasons in both.routed]


async def test_requests_are_shared_and_every_one_gets_its_tokens(running: Engines) -> None:
    found = await asyncio.gather(*(collect(running, [request(str(i), tokens=20)]) for i in range(6)))
    assert found == [{str(i): expected(20)} for i in range(6)]
    assert routed(running) == [3, 3]
    assert running.stats.num_steps_total == sum(engine.stats.num_steps_total for engine in running.members) > 0
    assert running.info.max_num_seqs == 2 * INFO.max_num_seqs
    assert running.info.max_model_len == INFO.max_model_len


async def test_all_choices_of_a_request_run_on_one_engine(running: Engines) -> None:
    found = await collect(running, [request("a", tokens=3), request("b", tokens=5)])
    assert found == {"a": expected(3), "b": expected(5)}
    assert routed(running) == [1, 0]


async def test_a_conversation_stays_where_its_prefix_is(running: Engines) -> None:
    async def turn(name: str, tokens: list[int]) -> None:
        await collect(running, [msgspec.structs.replace(request(name, tokens=1), prompt=tokens)])

    history = [9] * 100
    async with running.generate([request("long", tokens=10**6)]) as updates:  # keeps engine 0 busy
        await anext(updates)
        await turn("first", history)
        assert routed(running) == [1, 1]
        async with running.generate([request("longer", tokens=10**6)]) as others:  # engine 1 is as busy now
            await anext(others)
            await turn("second", [*history, *[8] * 50])
    assert running.routed[1]["prefix"] == 1


async def test_a_pin_ends_wherever_it_is(running: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    for engine in running.members:
        monkeypatch.setattr(engine, "unpin", ended.append)
    running.unpin("a")
    assert ended == ["a", "a"]


async def test_a_killed_engine_is_replaced_while_the_other_serves(running: Engines) -> None:
    streams: list[list[TokenUpdate]] = [[], []]
    victim, other = (engine.pid for engine in running.members)
    assert victim is not None

    async def read(number: int) -> None:
        async with running.generate([request(str(number), tokens=300)]) as updates:
            async for update in updates:
                streams[number].append(update)
                if number == 0 and len(streams[0]) == 30:
                    os.kill(victim, signal.SIGKILL)
                    await until(lambda: not running.members[0].health.ready)
                    assert running.health.ready
                    assert "engine 0: " in running.health.reason
                    assert await collect(running, [request("new", tokens=2)]) == {"new": expected(2)}
                    assert running.routed[1]["only"] == 1

    await asyncio.gather(read(0), read(1))
    tokens = [[token for update in stream for token in update.token_ids] for stream in streams]
    assert tokens == [expected(300), expected(300)]
    assert running.members[1].pid == other
    assert running.members[0].pid != victim
    assert running.supervision.restarts["signal"] == 1
    assert running.supervision.replayed_requests == 1
    assert running.health.reason == ""


async def test_an_engine_that_is_gone_for_good_leaves_the_others(running: Engines) -> None:
    running.members[0].give_up("it died three times in a row")
    assert (running.health.alive, running.health.ready) == (True, True)
    assert await collect(running, [request("a", tokens=2)]) == {"a": expected(2)}
    waiting = asyncio.create_task(running.ended())
    await asyncio.sleep(0)
    assert not waiting.done()
    running.members[1].give_up("and this one")
    assert await waiting == "engine 0: it died three times in a row; engine 1: and this one"
    assert not running.health.alive
    with pytest.raises(EngineDead):
        await collect(running, [request("b")])


async def test_a_model_that_cannot_be_loaded() -> None:
    both = engines("broken")
    with pytest.raises(EngineLoading):
        _ = both.info
    with pytest.raises(ConfigError, match="the model is broken"):
        await both.start()
    await both.first_start()
    await both.close()
    with pytest.raises(EngineDead):
        _ = both.info


async def test_requests_are_served_when_the_first_engine_is_ready(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second engine to load finds the mark of the first, and hangs."""
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", f"{tmp_path}/mark")
    both = engines("hangs later")
    start = asyncio.create_task(both.start())
    await both.first_start()
    assert both.health.ready
    assert both.health.loading is None
    assert await collect(both, [request("a", tokens=2)]) == {"a": expected(2)}
    assert both.info.max_num_seqs == 2 * INFO.max_num_seqs, "an engine that loads counts like one that has loaded"
    assert not start.done()
    await both.close()
    with pytest.raises(ConfigError):
        await start
