"""Whatever happens to a prefill server, a request completes with the tokens of one server alone, and the failure is
counted."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from jamba_server.engine.cache.tiers.segment import Entry
from jamba_server.engine.disk_tier.folder import SegmentFolder, files_in
from jamba_server.engine.disk_tier.format import BadSegment
from jamba_server.engine.disk_tier.prompt_segments import take_file
from jamba_server.engine.process.client import EngineClient
from jamba_server.server.http.prefill import hand_overs
from jamba_server.server.http.prefill.hand_overs import HandOvers
from tests.server.prefill.servers import (
    INNER_KEY,
    Between,
    Served,
    decode_config,
    long_text,
    nobody,
    prefill_config,
    served,
    start,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Pair:
    """A prefill server, and the engine and the folder of decode servers, each of which serves for one test."""

    prefill: Served
    engine: EngineClient
    disk: Path

    @asynccontextmanager
    async def decode(self, *urls: str, **settings: Any) -> AsyncGenerator[Served]:
        async with served(decode_config(self.disk, *urls, **settings), self.engine) as server:
            yield server

    def unfinished(self) -> list[Path]:
        return [file.path for file in files_in(self.disk) if file.path.suffix == ".part"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Pair]:
    one, other = tmp_path_factory.mktemp("prefill"), tmp_path_factory.mktemp("decode")
    config = prefill_config(one)
    engines = await asyncio.gather(start(config), start(decode_config(other, "http://later")))
    try:
        async with served(config, engines[0]) as prefill:
            yield Pair(prefill, engines[1], other)
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))


async def complete(server: Served, text: str, **fields: Any) -> tuple[Any, int]:
    """The choices of a greedy completion, and the number of cached tokens."""
    async with server.http() as http:
        body = {"prompt": text, "max_tokens": 8, "temperature": 0, "logprobs": 1, **fields}
        reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"], reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def check(server: Served, text: str, result: str, times: int = 1) -> None:
    """The prompt is computed here, with the same tokens as without prefix cache, and the failure is counted."""
    before = await server.results()
    said, cached = await complete(server, text)
    assert await server.results() == before | {result: before.get(result, 0) + times}
    expected, _ = await complete(server, text, cache={"read": False, "write": False})
    assert said == expected
    assert server.app.state.services.hand_overs.in_flight.total == 0
    assert cached < 96


async def test_a_damaged_segment(pair: Pair) -> None:
    """The last byte that comes of each reply differs."""
    between = Between(pair.prefill.url, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    async with between.served(), pair.decode(between.url) as server:
        await check(server, long_text("damaged"), "damaged")
    assert pair.unfinished() == []


async def test_what_came_before_the_damage_is_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def take(folder: SegmentFolder, path: Path, entry: Entry) -> None:
        if taken:
            raise BadSegment("edited", "the second one")
        take_file(folder, path, entry)
        taken.append(entry.end)

    async with pair.decode(pair.prefill.url) as server:
        monkeypatch.setattr(hand_overs, "take_file", take)
        said, cached = await complete(server, long_text("the first only", 2000))
        assert [cached] == taken
        assert await server.results() == {"damaged": 1}
        assert said == (await complete(server, long_text("the first only", 2000), cache={"read": False}))[0]


async def test_a_connection_that_breaks(pair: Pair) -> None:
    with nobody() as url:
        async with pair.decode(url) as server:
            await check(server, long_text("nobody"), "unreachable")


async def test_another_server_is_asked(pair: Pair) -> None:
    with nobody() as url:
        async with pair.decode(url, pair.prefill.url) as server:
            said, cached = await complete(server, long_text("the second"))
            assert cached >= 48
            assert await server.results() == {"received": 1}
            assert said == (await complete(server, long_text("the second"), cache={"read": False}))[0]


async def test_a_server_that_never_answers(pair: Pair) -> None:
    between = Between(pair.prefill.url, holds=True)
    async with between.served(), pair.decode(between.url, prefill_timeout=0.3) as server:
        await check(server, long_text("never"), "timeout")


async def test_a_wrong_key(pair: Pair) -> None:
    async with pair.decode(pair.prefill.url, prefill_api_key="wrong") as server:
        await check(server, long_text("wrong"), "refused")


async def test_a_server_that_shuts_down(pair: Pair) -> None:
    """A drained server answers 503."""
    lifecycle = pair.prefill.app.state.lifecycle
    lifecycle._draining = True
    try:
        async with pair.decode(pair.prefill.url) as server:
            await check(server, long_text("drained"), "refused")
    finally:
        lifecycle._draining = False


async def test_too_many_bytes(pair: Pair) -> None:
    async with pair.decode(pair.prefill.url, prefill_max_bytes=1000) as server:
        await check(server, long_text("large"), "too_large")
        await check(server, long_text("large again"), "too_large")


async def test_a_disk_that_is_full(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    async with pair.decode(pair.prefill.url) as server:
        monkeypatch.setattr(hand_overs, "take_file", full)
        await check(server, long_text("full"), "not_written")
    assert pair.unfinished() == []


async def test_other_weights(pair: Pair, tmp_path: Path) -> None:
    """They are refused before anything is computed."""
    config = prefill_config(tmp_path, load_format="dummy")
    engine = await start(config)
    try:
        async with served(config, engine) as other, pair.decode(other.url) as server:
            await check(server, long_text("other weights"), "other_model")
            assert engine.stats.num_steps_total == 0
    finally:
        await engine.close()


async def test_a_client_that_leaves_while_its_prompt_is_computed(pair: Pair) -> None:
    """The engine of the prefill server is stopped, so it cannot finish before the client has left."""
    prefill, between = pair.prefill.engine, Between(pair.prefill.url)
    assert prefill.pid is not None
    async with between.served(), pair.decode(between.url) as server:
        os.kill(prefill.pid, signal.SIGSTOP)
        try:
            async with server.http() as http:
                body = {"prompt": long_text("leaving"), "stream": True, "max_tokens": 4}
                request = asyncio.create_task(http.post("/v1/completions", json=body))
                while not list(prefill.live_requests()):
                    await asyncio.sleep(0.005)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
            await between.left.wait()
            while list(prefill.live_requests()):
                await asyncio.sleep(0.005)
        finally:
            os.kill(prefill.pid, signal.SIGCONT)
        assert await server.results() == {"abandoned": 1}
        assert list(pair.engine.live_requests()) == []
        await asyncio.sleep(0)
        assert (await complete(server, long_text("afterwards")))[1] >= 48


async def test_a_time_limit_ends_a_hand_over(pair: Pair) -> None:
    between = Between(pair.prefill.url, holds=True)
    async with between.served(), pair.decode(between.url) as server, server.http() as http:
        body = {"prompt": long_text("limit"), "max_tokens": 4, "timeout": 1.5}
        reply = await http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        await between.left.wait()
        assert await server.results() == {"abandoned": 1}
        metrics = (await http.get("/metrics")).text
        assert re.search(r'jamba_aborted_requests_total\{model_name="jamba-demo",reason="deadline"\} 1', metrics)


@contextmanager
def prefill_process(disk: Path) -> Generator[tuple[subprocess.Popen[str], str]]:
    """`jamba serve --role prefill`, in a process group of its own."""
    command = [sys.executable, "-m", "jamba_server", "serve", "--port", "0", "--threads", "1", "--dtype", "float32"]
    command += [
        "--max-num-seqs",
        "8",
        "--role",
        "prefill",
        "--api-key",
        INNER_KEY,
        "--state-cache-disk-path",
        str(disk),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            log: list[str] = []
            for line in process.stderr:
                log.append(line)
                if found := re.search(r"--prefill-url (http://\S+)$", line.rstrip()):
                    assert any("role      prefill: this server computes prompts" in line for line in log)
                    yield process, found[1]
                    return
            raise AssertionError("".join(log))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


async def test_kill_9_in_the_middle_of_a_segment(pair: Pair, tmp_path: Path) -> None:
    with prefill_process(tmp_path) as (process, url):
        while (await asyncio.to_thread(httpx.get, f"{url}/ready")).status_code != 200:
            await asyncio.sleep(0.05)

        def kill(data: bytes) -> bytes:
            """Kills the server when the first bytes of a segment have come, and passes some of them on."""
            if process.poll() is not None:
                return b""
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return data[:100]

        between = Between(url, kill)
        async with between.served(), pair.decode(between.url) as server:
            while not await _is_open(url):
                await asyncio.sleep(0.02)
            text = long_text("killed", 2000)
            before = await server.results()
            said, cached = await complete(server, text)
            assert await server.results() == before | {"unreachable": 1}
            assert cached == 0
            assert said == (await complete(server, text, cache={"read": False}))[0]
    assert pair.unfinished() == []


async def _is_open(url: str) -> bool:
    """Whether the server has hashed its weights. Until then, it refuses prompts."""
    body = {"prompt": [5], "fingerprint": "0" * 64}
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {INNER_KEY}"}) as http:
        return (await http.post(f"{url}/v1/prefill", json=body)).status_code == 409


async def test_nothing_is_lost_when_the_server_comes_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair.decode(pair.prefill.url) as server:
        overs: HandOvers = server.app.state.services.hand_overs
        for peer in overs.servers:
            monkeypatch.setattr(peer, "_rests_until", math.inf)
        await check(server, long_text("resting"), "resting")
        for peer in overs.servers:
            monkeypatch.setattr(peer, "_rests_until", 0.0)
        assert (await complete(server, long_text("back")))[1] >= 48
        assert (await server.results())["received"] == 1
