"""The lines that operators read."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import pytest

from jamba_server.engine.types import EngineStats
from jamba_server.server.http.logs import Snapshot, describe_interval, log_stats
from jamba_server.server.http.metrics import Metrics
from tests.server.conftest import Bench, chat
from tests.server.fake_engine import FakeEngine

IDLE = EngineStats(kv_blocks_capacity=4, state_slots_capacity=8)
BUSY = EngineStats(
    num_running=2, num_waiting=1, kv_blocks_used=1, kv_blocks_capacity=4, state_slots_used=3, state_slots_capacity=8,
    prefix_queries_total=200, prefix_hits_total=50,
)  # fmt: skip


def test_an_interval() -> None:
    line = describe_interval(Snapshot(100, 10, IDLE), Snapshot(300, 60, BUSY), 10.0)
    assert line == (
        "prompt 20.0 tok/s, generation 5.0 tok/s, running 2, waiting 1, KV cache 25.0%, state slots 3/8, "
        "prefix cache hits 25.0%"
    )


def test_an_interval_without_prompts_has_no_hit_rate() -> None:
    line = describe_interval(Snapshot(100, 10, BUSY), Snapshot(100, 60, BUSY), 10.0)
    assert line is not None
    assert line.endswith("prefix cache hits -")


def test_an_idle_interval_is_silent() -> None:
    assert describe_interval(Snapshot(100, 10, IDLE), Snapshot(100, 10, IDLE), 10.0) is None


async def test_a_line_an_interval_while_busy(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine.stats = BUSY
    task = asyncio.create_task(log_stats(Metrics(engine, model_name="m"), engine, interval=0.001))
    while len(caplog.messages) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert all("running 2, waiting 1" in message for message in caplog.messages)


async def test_a_line_a_request(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jamba_server.server.http.generation")
    async with bench.http() as http:
        headers = {"X-Request-Id": "r1"}
        await http.post("/v1/chat/completions", json=chat(n=2, max_tokens=1), headers=headers)
    [line] = caplog.messages
    pattern = (
        r"request_id=r1 id=chatcmpl-[0-9a-f]{32} prompt=\d+ cached=3 generated=2 queue=0.250 s ttft=\d+\.\d{3} s "
        r"e2e=\d+\.\d{3} s finish=length"
    )
    assert re.fullmatch(pattern, line), line


def test_the_set_up() -> None:
    program = (
        "import logging; from jamba_server.server.cli.log import configure_logging; configure_logging('INFO')\n"
        "logging.getLogger('jamba_server.server.x').info('a %s', 'b'); logging.getLogger('uvicorn.error').info('c')\n"
        "logging.getLogger('uvicorn.access').info('d'); logging.getLogger('jamba_server.server.x').debug('e')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = result.stderr.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO server.x: a b", "INFO uvicorn.error: c"]
