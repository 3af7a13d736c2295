"""What the start of an engine does on a GPU alone, with stand-ins for the few lines that call CUDA."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from jamba_server.engine.cache.graph_sizes import GraphKey
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.start import build
from jamba_server.engine.start.build import Loaded, capture, dummy_steps, make_runner
from jamba_server.engine.start.memory_plan import plan_memory
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, result
from tests.engine.test_graphs import Recorded

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
PROMPTS = [[Random(i).randrange(3, 500) for _ in range(10 + 9 * i)] for i in range(6)]


class OnGpu(str):
    """A device that torch takes for the CPU, and the engine's start for a GPU."""

    type = "cuda"


@pytest.mark.parametrize("ahead", [None, False])
def test_the_runner_of_a_gpu_has_graphs_tables_and_a_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead: bool | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 40, "max_model_len": 300}
    eager, llm = (LLM(tmp_path, load_format="dummy", threads=1, **settings, enforce_eager=True) for _ in range(2))
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(build, "CudaGraph", lambda pool: Recorded(log))
    monkeypatch.setattr(build, "free_gpu_bytes", lambda: 1 << 40)
    monkeypatch.setattr(build, "captures_prompts", lambda names, device: True)
    monkeypatch.setattr(build, "why_no_graphs", lambda names, device: None)
    old, config = llm.core.model_runner, EngineConfig(model=str(tmp_path), async_scheduling=ahead, **settings)
    layout = cache_layout(old.model.config, block_size=16, dtype="bfloat16")
    parts = old.model, Pipe(old.model.parts.stage), old.sampler, old.masks, old.kernels
    device: Any = OnGpu("cpu")
    loaded = Loaded(*parts, policy=None, dtype=torch.bfloat16, layout=layout, device=device)  # pyright: ignore[reportArgumentType]
    plan = plan_memory(old.model.config, config, layout, weight_bytes=1, available_bytes=1 << 29, device="cuda")
    assert plan.table_bytes == 4 * 5 * 19
    runner = make_runner(loaded, config, plan)
    assert runner.tables is not None
    assert tuple(runner.tables.tables.shape) == (5, 19)
    assert (runner.sampled is None) == (ahead is False)
    reply = dummy_steps(config, old.model.config, plan).reply()
    assert reply is not None
    with caplog.at_level(logging.INFO):
        capture(runner, reply, lambda phase, fraction: None)
    assert "captured 3 CUDA graphs in" in caplog.text
    assert runner.graphs is not None
    assert runner.graphs.captured == {GraphKey(rows, 300) for rows in (1, 2, 4)}
    llm.core.model_runner = runner
    llm.core.scheduler = build.make_scheduler(loaded, config, plan, runner.storage, None)
    for _ in range(2):
        expected = [result(completion) for completion in eager.generate(PROMPTS, GREEDY)]
        assert [result(completion) for completion in llm.generate(PROMPTS, GREEDY)] == expected
    assert any(key.prompts and key.rows for key in runner.graphs.captured)
    assert log.count("replay") > 20
