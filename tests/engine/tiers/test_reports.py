"""Reports and counts name the tier that a prefix came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.cache.tiers.cache import TieredCache
from jamba_server.engine.core import EngineCore
from jamba_server.engine.disk_tier.worker import Worker
from jamba_server.engine.types import CacheReport, CacheUse, Request, SamplingParams
from tests.engine.tiers.conversations import engine, make_model

PROMPT = [3 + i % 250 for i in range(100)]
OTHERS = [[7 + (i * (n + 2)) % 250 for i in range(200)] for n in range(4)]
SMALL = {"kv_cache_memory_bytes": 40 * 1024, "state_cache_memory_bytes": 50 * 1024}
# The prompt has 100 tokens, of which the last must be computed. A state was saved after the last full page of 16.
USED = 96


def start(model: Path, **settings: Any) -> EngineCore:
    core = engine(model, **settings)
    assert isinstance(core.scheduler.cache, TieredCache)
    if isinstance(disk := core.scheduler.cache.tiers.disk, Worker):
        assert disk.wait_until_open(30)
    return core


def ask(core: EngineCore, prompt: list[int]) -> tuple[list[int], CacheReport]:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    core.inbox.submit([Request(id="r", prompt=prompt, params=params, cache=CacheUse(explain=True))])
    tokens: list[int] = []
    report: CacheReport | None = None
    while True:
        for update in core.step().updates:
            tokens += update.token_ids
            report = report or update.cache
            if update.finish_reason:
                assert report is not None
                return tokens, report


def hits(core: EngineCore) -> tuple[int, int, int]:
    stats = core.scheduler.stats
    found = stats.hits_device_total, stats.hits_host_total, stats.hits_disk_total
    assert sum(found) == stats.prefix_hits_total
    return found


def shown(report: CacheReport) -> tuple[int, str | None, str]:
    return report.used_tokens, report.tier, report.reason


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_the_disk_and_then_the_device(model: Path, tmp_path: Path) -> None:
    settings = {"state_cache_disk_path": str(tmp_path)}
    core = start(model, **settings)
    reply, report = ask(core, PROMPT)
    assert (shown(report), report.restore_seconds) == ((0, None, "not_seen"), 0.0)
    core.close(20.0)
    core = start(model, **settings)
    again, report = ask(core, PROMPT)
    assert (again, shown(report)) == (reply, (USED, "disk", "complete"))
    counted = core.scheduler.stats.tiers
    assert counted is not None
    assert report.restore_seconds >= counted.restore_seconds_total["disk"] > 0
    again, report = ask(core, PROMPT)
    assert (again, shown(report)) == (reply, (USED, "device", "complete"))
    assert hits(core) == (USED, 0, USED)
    core.close(20.0)


def test_the_host(model: Path) -> None:
    core = start(model, state_cache_host_bytes=20 << 20, **SMALL)
    reply, _ = ask(core, PROMPT)
    for prompt in OTHERS:
        ask(core, prompt)
    again, report = ask(core, PROMPT)
    assert (again, shown(report)) == (reply, (USED, "host", "complete"))
    assert report.restore_seconds > 0
    again, report = ask(core, PROMPT)
    assert (again, shown(report)) == (reply, (USED, "device", "complete"))
    assert hits(core) == (USED, USED, 0)


@pytest.mark.parametrize("restart", [False, True])
def test_files_that_cannot_be_used(model: Path, tmp_path: Path, *, restart: bool) -> None:
    """The engine that had the prefix on its device knows that it was evicted; an engine after it does not."""
    settings = {"state_cache_disk_path": str(tmp_path), **SMALL}
    core = start(model, **settings)
    reply, _ = ask(core, PROMPT)
    for prompt in OTHERS:
        ask(core, prompt)
    if restart:
        core.close(20.0)
        core = start(model, **settings)
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    again, report = ask(core, PROMPT)
    assert (again, shown(report)) == (reply, (0, None, "not_seen" if restart else "evicted"))
    assert report.restore_seconds == 0.0
    assert hits(core) == (0, 0, 0)
    core.close(20.0)
