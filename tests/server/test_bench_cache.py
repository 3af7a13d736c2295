"""Workloads that share prefixes, sent to the real engine: the report has what the prefix cache saved."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.cli.bench.command import Bench, BenchOptions
from jamba_server.server.cli.bench.report import Level
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.real_engine import served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url() -> AsyncGenerator[str]:
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine) as client:
        yield str(client.base_url).removesuffix("v1/")
    await engine.close()


async def measure(url: str, options: BenchOptions) -> Level:
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
        (level,) = (await Bench(http, options).run()).levels
    assert not level.errors
    assert level.completed == level.planned
    return level


async def test_agents_read_their_loops_from_the_cache(url: str) -> None:
    options = BenchOptions(
        workload="agents", turns=4, tools=2, prefix_len=40, input_len=10, result_len=10, output_len=3,
        num_prompts=3, num_warmups=0, concurrency="1",
    )  # fmt: skip
    level = await measure(url, options)
    assert level.completed == 12
    assert level.cached_share is not None
    assert level.cached_share > 0.7


async def test_conversations_of_a_trace_continue_with_the_tokens_of_the_replies(url: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{20 * number},{40 * (number + 1)},5" for number in range(10)]
    path.write_text("\n".join(["seconds,input_tokens,output_tokens", *rows, ""]))
    shares: dict[str, float | None] = {}
    for sharing in ("none", "chats"):
        options = BenchOptions(
            workload="trace", trace=str(path), sharing=sharing, time_scale=0.001, num_warmups=0, vocab_size=4000
        )
        level = await measure(url, options)
        assert (level.prompt_tokens, level.output_tokens) == (sum(40 * (n + 1) for n in range(10)), 50)
        shares[sharing] = level.cached_share
    assert shares["none"] == 0
    assert shares["chats"] is not None
    assert shares["chats"] > 0.2
