"""The engine in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_server.engine.types import SamplingParams, StepResult
from jamba_server.llm import LLM
from tests.tiny import TINY_CONFIGS, save_tiny


def test_an_interrupt_leaves_no_work_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, **next(iter(TINY_CONFIGS.values())))
    llm = LLM(tmp_path, dtype="float32", max_model_len=64, max_num_seqs=2, threads=1)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    step, steps = llm.core.step, 0

    def interrupted() -> StepResult:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7], [8]], params)
    [completion] = llm.generate([[5, 6, 7]], params)
    assert len(completion.token_ids) == 8
    assert llm.core.scheduler.stats.kv_blocks_used == 0
