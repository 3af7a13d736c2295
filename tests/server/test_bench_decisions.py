"""`jamba bench --workload decisions`, against a real engine."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.client import Context, Failure
from jamba_server.server.cli.bench.command import Bench, BenchOptions
from jamba_server.server.cli.bench.decisions import DecisionClient, DecisionTurn, note
from tests.server.vector_server import save_model, serve_model


async def test_the_prefix_is_computed_once(tmp_path: Path) -> None:
    save_model(tmp_path)
    bench = serve_model(tmp_path)
    options = BenchOptions(workload="decisions", concurrency="2", num_prompts=4, input_len=40, questions=6)
    async with bench.http() as http:
        [level] = (await Bench(http, options).run()).levels
    assert (level.completed, level.failed, level.output_tokens) == (4, 0, 24)
    assert level.computed_tokens is not None
    # the labels of the questions have a few tokens more, and common beginnings of the prompts a few less
    assert 0.9 < level.computed_tokens / level.prompt_tokens < 1.3
    assert "24 answers" in note(level)
    whole = sum(len(request.prompt) for request in bench.engine.requests if request.id.count("-") == 2)
    assert whole > 3 * level.computed_tokens, "computing each question alone would take much more"


async def test_a_failure_is_recorded() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"error": {"message": "no"}})

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://server") as http:
        record = await DecisionClient(http, "m").send(DecisionTurn("a", 1, questions=("b",)), Context())
    assert isinstance(record, Failure)
    assert (record.kind, record.message) == ("http_400", "no")


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong in ({"output_len": 3}, {"vocab_size": 9}, {"questions": 0}):
        with pytest.raises(ConfigError):
            BenchOptions(workload="decisions", **wrong).make_workload()  # type: ignore[arg-type]
