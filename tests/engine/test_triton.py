"""The engine with the Triton kernels: on a GPU, or on a CPU in triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from jamba_server.engine.start import build
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels import table
from jamba_server.kernels.triton import interpreted
from jamba_server.llm import LLM, Completion
from tests.engine.test_gguf_exact import written
from tests.engine.test_graphs import with_graphs
from tests.engine.test_parity import NEW_TOKENS, check
from tests.kernels.interpreter_guard import guard
from tests.tiny import TINY_CONFIGS, save_tiny

PARAMS = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(autouse=interpreted())
def guarded(request: pytest.FixtureRequest) -> Iterator[None]:
    """See `interpreter_guard`. Rows of padding are no error, although several of them write page 0 and slot 0."""
    with nullcontext() if "padded" in request.node.name else guard():
        yield


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if interpreted():
        monkeypatch.setattr(
            build,
            "select",
            lambda device, wishes, batch_invariant: table.select("cuda", {"all": "triton"}, batch_invariant),
        )
    device = "cpu" if interpreted() else "cuda"
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}
    return {"device": device, "dtype": "float32", **sizes}


def result(completion: Completion) -> tuple[list[int], list[float]]:
    return completion.token_ids, [entry.logprob for entry in completion.logprobs]


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_quantised_weights_give_what_the_other_kernels_give(
    format: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS["moe-gqa"])
    settings |= {"quantization": format, "quantize_mamba": True}
    prompts = [[5, 9, 23, 4, 17, 40], [7, 3]]
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=0)
    found = LLM(tmp_path, **settings).generate(prompts, params)
    [alone] = LLM(tmp_path, **settings | {"max_num_batched_tokens": 4}).generate(prompts[:1], params)
    assert result(alone) == result(found[0])
    monkeypatch.setattr(build, "select", table.select)
    kernels = {"linear": "reference", "run_experts": "reference"}
    expected = LLM(tmp_path, **settings | {"device": "cpu", "kernels": kernels}).generate(prompts, params)
    for ours, theirs in zip(found, expected, strict=True):
        (tokens, scores), (other_tokens, other_scores) = result(ours), result(theirs)
        assert tokens == other_tokens
        assert scores == pytest.approx(other_scores, abs=1e-4)


def test_weights_of_a_gguf_file_stay_packed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q6_K stands beside Q4_K in a product of several matrices and in the experts."""
    path = written(tmp_path, "Q4_K", "Q6_K")
    prompts, params = [[5, 9, 23, 4], [7]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)
    triton = LLM(path, **settings)
    found = triton.generate(prompts, params)
    monkeypatch.setattr(build, "select", table.select)
    other = LLM(path, **settings | {"device": "cpu", "kernels": {"linear": "reference", "run_experts": "reference"}})
    assert triton.core.info.weight_bytes == other.core.info.weight_bytes
    for ours, theirs in zip(found, other.generate(prompts, params), strict=True):
        assert result(ours)[1] == pytest.approx(result(theirs)[1], abs=1e-3)


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


def test_graphs_and_async_scheduling_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS["moe-gqa"])
    plain = LLM(tmp_path, **settings, enforce_eager=True, async_scheduling=False)
    fast = LLM(tmp_path, **settings, async_scheduling=True)
    if interpreted():
        with_graphs(fast)
    assert plain.core.model_runner.graphs is None
    assert fast.core.model_runner.graphs is not None
    random = Random(1)
    # three rows of a graph for four, captured once and replayed twice
    prompts = [[random.randrange(3, fast.core.info.vocab_size) for _ in range(length)] for length in (3, 2, 1)]
    params = msgspec.structs.replace(PARAMS, max_tokens=4)
    expected = [result(completion) for completion in plain.generate(prompts, params)]
    assert [result(completion) for completion in fast.generate(prompts, params)] == expected


def test_padded_graphs_of_steps_with_prompts_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """A reply, the second chunk of a prompt, a new prompt and padding of all kinds run in one graph."""
    save_tiny(tmp_path, **TINY_CONFIGS["moe-gqa"])
    settings |= {"max_num_batched_tokens": 12}
    plain = LLM(tmp_path, **settings, enforce_eager=True, async_scheduling=False)
    fast = LLM(tmp_path, **settings, async_scheduling=True)
    log = with_graphs(fast, mixed=True) if interpreted() else ["replay"]
    random = Random(2)
    prompts = [[random.randrange(3, fast.core.info.vocab_size) for _ in range(length)] for length in (3, 30, 9)]
    params = msgspec.structs.replace(PARAMS, max_tokens=5)
    expected = [result(completion) for completion in plain.generate(prompts, params)]
    assert [result(completion) for completion in fast.generate(prompts, params)] == expected
    graphs = fast.core.model_runner.graphs
    assert graphs is not None
    assert any(key.rows and key.prompts for key in graphs.captured)
    assert "replay" in log
