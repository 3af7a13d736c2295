"""The engine with the Triton kernels: on a GPU, or on a CPU in triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

import engine.core
from engine.llm import LLM, Completion
from engine.types import SamplingParams
from kernels import table
from kernels.triton import interpreted
from tests.engine.test_parity import NEW_TOKENS, check
from tests.tiny import TINY_CONFIGS, save_tiny

PARAMS = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if interpreted():
        monkeypatch.setattr(
            engine.core, "select", lambda device, wishes, exact: table.select("cuda", {"all": "triton"}, exact)
        )
    device = "cpu" if interpreted() else "cuda"
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}
    return {"device": device, "dtype": "float32", **sizes}


def result(completion: Completion) -> tuple[list[int], list[float]]:
    return completion.token_ids, [entry.logprob for entry in completion.logprobs]


def test_equals_transformers_and_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **TINY_CONFIGS["moe-gqa"])
    llm = LLM(tmp_path, **settings)
    assert set(llm.core.info.kernels.values()) == {"triton"}
    random = Random(0)
    prompts = [[random.randrange(3, llm.core.info.vocab_size) for _ in range(length)] for length in (1, 17, 30)]
    together = llm.generate(prompts, PARAMS)
    check(model, together)
    # alone, in other chunks, and from the cache
    alone = LLM(tmp_path, **settings | {"max_num_batched_tokens": 9}).generate(prompts[2:], PARAMS)
    assert result(alone[0]) == result(together[2])
    again = llm.generate(prompts[2:], PARAMS)
    assert again[0].num_cached > 0
    assert result(again[0]) == result(together[2])
