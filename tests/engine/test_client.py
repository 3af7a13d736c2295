"""Supervision of the engine process, with scripted engines that die and hang on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import (
    ConfigError,
    EngineDead,
    EngineFailed,
    EngineLoading,
    ModelCannot,
    Overloaded,
    RequestRejected,
)
from jamba_server.engine.process.client import EngineClient, Health
from jamba_server.engine.process.streams import BACKLOG_BYTES, LiveRequest
from jamba_server.engine.process.supervisor import Watchdog
from jamba_server.engine.types import BACKGROUND_PRIORITY, Progress, Request, SamplingParams, TokenUpdate

COMMAND = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))


def request(name: str, *, prompt: int = 1, tokens: int = 5) -> Request:
    return Request(id=name, prompt=[prompt], params=SamplingParams(max_tokens=tokens))


def client(
    *, timeout: float = 60.0, load_timeout: float = 60.0, max_queue: int = 0, model: str = "any"
) -> EngineClient:
    return EngineClient(
        EngineConfig(model=model),
        engine_timeout=timeout,
        load_timeout=load_timeout,
        max_queue_requests=max_queue,
        command=COMMAND,
    )


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.restarts.BACKOFF_SECONDS", 0.0)


@pytest.fixture
async def running() -> AsyncIterator[EngineClient]:
    engine = client()
    await engine.start()
    yield engine
    await engine.close()


async def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds. Only a test that fails reaches the time limit."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def kill(engine: EngineClient) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


def restarts(engine: EngineClient) -> dict[str, int]:
    return {reason: number for reason, number in engine.supervision.restarts.items() if number}


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


async def test_a_kind_that_the_model_cannot_serve_is_refused(running: EngineClient) -> None:
    with pytest.raises(ModelCannot, match="without a classifier"):
        async with running.generate([msgspec.structs.replace(request("a", tokens=1), kind="classify")]):
            pass
    assert await collect(running, [request("a", tokens=2)]), "it left nothing behind"


async def test_the_engine_has_standard_streams_of_its_own(running: EngineClient) -> None:
    if not (files := Path(f"/proc/{running.pid}/fd")).exists():
        pytest.skip("this system does not show the files of a process")
    assert (files / "0").readlink() == Path(os.devnull)
    assert (files / "1").exists() and (files / "2").exists()


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
    assert restarts(running) == {"signal": 1}
    assert running.supervision.replayed_requests == 1


async def test_deaths_after_progress_never_end_it_and_hold_no_stream_up(running: EngineClient) -> None:
    tokens: dict[str, list[int]] = {f"r{i}": [] for i in range(4)}
    async with running.generate([request(name, tokens=300) for name in tokens]) as updates:
        async for update in updates:
            tokens[update.request_id] += update.token_ids
            if update.request_id == "r0" and len(tokens["r0"]) % 50 == 25:
                kill(running)
    assert tokens == {name: expected(300) for name in tokens}
    assert restarts(running) == {"signal": 6}
    assert running.supervision.replayed_requests == 4 * 6


async def test_a_request_that_kills_every_engine_fails_and_the_others_live(running: EngineClient) -> None:
    good = asyncio.create_task(collect(running, [request("good", tokens=900)]))
    with pytest.raises(EngineFailed, match="each time that it ran this request"):
        await collect(running, [request("bad", prompt=666, tokens=99)])
    assert await good == {"good": expected(900)}
    assert running.health.ready


async def test_kills_without_progress_between_them_fail_no_request(running: EngineClient) -> None:
    """A request that waits for its first token while the engine is killed again and again, but not three times in a row
    without a finished step."""
    waiting = asyncio.create_task(collect(running, [request("waits", prompt=557, tokens=2000)]))
    for number in range(1, 7):
        steps = running.stats.num_steps_total
        await until(lambda: running.health.ready and running.stats.num_steps_total > steps)  # noqa: B023
        kill(running)
        await until(lambda: running.supervision.restarts["signal"] == number)  # noqa: B023
    waiting.cancel()
    assert running.health.alive
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_deaths_that_a_failed_request_explains_do_not_count_against_the_engine(running: EngineClient) -> None:
    good = asyncio.create_task(collect(running, [request("good", tokens=900)]))
    bad = [asyncio.create_task(collect(running, [request(f"bad {i}", prompt=666, tokens=99)])) for i in range(2)]
    for task in bad:
        with pytest.raises(EngineFailed):
            await task
    assert await good == {"good": expected(900)}


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


@pytest.mark.parametrize("prompt", [668, 669])  # at its first step; before it is in the queue
async def test_a_request_that_kills_an_idle_engine_fails_and_the_engine_stays(
    running: EngineClient, prompt: int
) -> None:
    with pytest.raises(EngineFailed, match="each time"):
        await collect(running, [request("bad", prompt=prompt)])
    assert await collect(running, [request("good")]) == {"good": expected(5)}


async def test_bytes_that_are_no_message_are_a_death(running: EngineClient) -> None:
    good = asyncio.create_task(collect(running, [request("good", tokens=900)]))
    with pytest.raises(EngineFailed):
        await collect(running, [request("garbage", prompt=556)])
    assert await good == {"good": expected(900)}
    assert restarts(running).keys() == {"message"}


async def test_a_message_that_cannot_be_handled_is_a_death(
    running: EngineClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once(live: LiveRequest, update: TokenUpdate) -> TokenUpdate:
        monkeypatch.undo()
        raise RuntimeError("a defect")

    monkeypatch.setattr(LiveRequest, "take", fail_once)
    assert await collect(running, [request("a")]) == {"a": expected(5)}
    assert restarts(running) == {"message": 1}
    assert "a defect" in caplog.text


def removable_command(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A program that is there until a test removes it, and a command that runs the scripted engine with it."""
    program = folder / "program"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return program, (str(program), *COMMAND[1:])


async def test_a_failed_spawn_is_tried_again_until_it_succeeds(tmp_path: Path) -> None:
    program, command = removable_command(tmp_path)
    engine = EngineClient(EngineConfig(model="any"), command=command)
    await engine.start()
    program.rename(tmp_path / "elsewhere")
    reply = asyncio.create_task(collect(engine, [request("a", tokens=500)]))
    await until(lambda: engine.stats.num_steps_total > 10)
    kill(engine)
    await until(lambda: engine.supervision.restarts["spawn"] > 10)
    assert engine.health.alive
    assert "cannot be started" in engine.health.reason
    (tmp_path / "elsewhere").rename(program)
    assert await reply == {"a": expected(500)}
    await engine.close()


async def test_closing_does_not_wait_for_the_next_start(running: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.restarts.BACKOFF_SECONDS", 3600.0)
    monkeypatch.setattr("jamba_server.engine.process.restarts.MAX_BACKOFF_SECONDS", 3600.0)
    kill(running)
    await until(lambda: running.supervision.restarts["signal"] == 1)
    async with asyncio.timeout(30):
        await running.close()


async def test_three_deaths_without_a_step_end_it_and_say_so() -> None:
    engine = client()
    await engine.start()
    ended = asyncio.create_task(engine.ended())
    killed: set[int] = set()
    while engine.health.alive:
        if engine.health.ready and engine.pid is not None and engine.pid not in killed:
            killed.add(engine.pid)
            kill(engine)
        await asyncio.sleep(0.01)
    assert len(killed) == 3
    reason = "the engine process ended with signal 9, the third time in a row without a finished step"
    assert engine.health.reason == await ended == reason
    with pytest.raises(EngineDead, match="third time"):
        await collect(engine, [request("late")])
    await engine.close()


async def test_an_engine_that_cannot_load_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", str(tmp_path / "mark"))
    engine = client(model="loads once")
    await engine.start()
    async with asyncio.timeout(30):
        with pytest.raises(EngineDead, match="status 9 while loading, the third time in a row"):
            await collect(engine, [request("bad", prompt=666, tokens=99)])
    await engine.close()


async def test_an_engine_that_hangs_while_it_loads_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", str(mark))
    engine = client(model="hangs later", load_timeout=0.1)
    with pytest.raises(ConfigError, match=r"made no progress for 0.1 s \(--load-timeout\) and was killed"):
        await engine.start()


async def test_an_engine_that_hangs_while_it_loads_again_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("SCRIPTED_ENGINE_MARK", str(mark))
    engine = client(model="hangs later", load_timeout=2.0)
    await engine.start()
    reply = asyncio.create_task(collect(engine, [request("a", tokens=500)]))
    await until(lambda: engine.stats.num_steps_total > 10)
    kill(engine)
    await until(lambda: engine.supervision.restarts["load_timeout"] > 0)
    mark.unlink()
    assert await reply == {"a": expected(500)}
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
    with pytest.raises(EngineFailed):
        await collect(engine, [request("hang", prompt=555)])
    assert restarts(engine) == {"step_timeout": 3}
    await engine.close()


class Still:
    """An engine process that sends no message."""

    num_messages, killed = 0, False

    def kill(self) -> None:
        self.killed = True


async def test_time_in_which_this_process_stood_still_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client(timeout=100.0)
    sleeps = 0

    async def sleep(seconds: float) -> None:  # an hour passes in each, as after SIGSTOP or a suspended machine
        nonlocal sleeps
        sleeps += 1

    monkeypatch.setattr("jamba_server.engine.process.supervisor.asyncio.sleep", sleep)
    child: Any = Still()
    owner: Any = SimpleNamespace(is_loading=False, is_busy=True)
    watchdog = Watchdog(owner, engine_timeout=100.0, load_timeout=1000.0)
    assert await watchdog.watch(child) == ("step_timeout", "reported no step for 100 s (--engine-timeout)")
    assert child.killed
    assert sleeps > 100, "the seconds are those of its own sleep"
    assert engine.health.alive


# Readers that do not read ---------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_reads_is_paused_and_goes_on_where_it_was(running: EngineClient) -> None:
    tokens: list[int] = []
    async with running.generate([request("a", tokens=1500)]) as updates:
        await until(lambda: running.supervision.pauses == 1 and running.stats.num_running == 0)
        steps, backlog = running.stats.num_steps_total, running.supervision.backlog_bytes
        assert await collect(running, [request("b", tokens=50)]) == {"b": expected(50)}, "others go on"
        assert running.stats.num_steps_total <= steps + 50 + 1, "and it does not"
        assert running.supervision.backlog_bytes == backlog < 2 * BACKLOG_BYTES
        async for update in updates:
            assert update.request_id == "a"
            tokens += update.token_ids
    assert tokens == expected(1500)
    assert running.supervision.backlog_bytes == 0


async def test_a_paused_request_survives_the_death_of_the_engine(running: EngineClient) -> None:
    requests = [request(name, tokens=900) for name in "ab"]
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    async with running.generate(requests) as updates:
        await until(lambda: running.supervision.pauses == 1)
        kill(running)
        await until(lambda: running.supervision.restarts["signal"] == 1 and running.health.ready)
        assert await collect(running, [request("c", tokens=50)]) == {"c": expected(50)}
        assert running.stats.num_running == 0
        async for update in updates:
            tokens[update.request_id] += update.token_ids
    assert tokens == {"a": expected(900), "b": expected(900)}


async def test_a_paused_request_can_be_left(running: EngineClient) -> None:
    async with running.generate([request("a", tokens=1500), request("b", tokens=1500)]) as updates:
        await until(lambda: running.supervision.pauses == 1)
        updates.abort("b")
    assert await collect(running, [request("c", tokens=2)]) == {"c": expected(2)}
    assert running.stats.num_running == 0
    assert running.supervision.backlog_bytes == 0


async def test_before_it_is_ready_it_says_so() -> None:
    engine = client()
    with pytest.raises(EngineLoading, match="loading"):
        _ = engine.info
    assert not engine.health.ready


async def test_a_full_queue_is_refused() -> None:
    """The engine has eight places, so two choices wait when there are ten."""
    engine = client(max_queue=2)
    await engine.start()
    async with AsyncExitStack() as stack:
        for number in range(4):  # a burst: none of them has started
            await stack.enter_async_context(engine.generate([request(f"a{number}"), request(f"b{number}")]))
        async with engine.generate([request("a"), request("b")]):
            with pytest.raises(Overloaded, match=r"10 choices are waiting and the request has 1; 8 places are free"):
                async with engine.generate([request("c")]):
                    pass
        async with engine.generate([request("d")]):
            with pytest.raises(Overloaded, match=r"9 choices are waiting and the request has 2; .*the limit .* is 2"):
                async with engine.generate([request("e"), request("f")]):
                    pass
    with pytest.raises(RequestRejected, match=r"asks for 3 choices; the limit .* is 2"):  # it would never be admitted
        async with engine.generate([request(name) for name in "ghi"]):
            pass
    await engine.close()


async def test_the_background_takes_no_place_in_the_queue() -> None:
    engine = client(max_queue=2)
    await engine.start()
    async with AsyncExitStack() as stack:
        for number in range(20):
            line = msgspec.structs.replace(request(f"b{number}"), priority=BACKGROUND_PRIORITY)
            await stack.enter_async_context(engine.generate([line]))
        for number in range(10):
            await stack.enter_async_context(engine.generate([request(f"a{number}")]))
        with pytest.raises(Overloaded, match="10 choices are waiting"):
            await stack.enter_async_context(engine.generate([request("c")]))
    await engine.close()


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


async def test_a_model_that_cannot_be_loaded_is_one_sentence_for_all_who_wait() -> None:
    engine = client(model="broken")
    waiting = asyncio.create_task(engine.first_start())
    with pytest.raises(ConfigError, match="the model is broken"):
        await engine.start()
    await waiting
    with pytest.raises(EngineDead, match="the model is broken"):
        _ = engine.info
