"""Exact by construction: tokens and log-probabilities are equal, bit for bit, whatever happens around a request."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM, Completion
from tests.nightly import nightly

CONFIG = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 500,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QUANTIZED = {"quantize_mamba": True}  # every product that can be
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "amx": {"dtype": "bfloat16", "kernels": {"linear": "cpu:amx-emulated"}},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantization": "int8", "activation_quantization": "none", **QUANTIZED},
    "int4": {"dtype": "bfloat16", "quantization": "int4-g32", "activation_quantization": "int8", **QUANTIZED},
}
NEW_TOKENS = 24
RANDOM = Random(5)
SUBJECT = [RANDOM.randrange(3, 500) for _ in range(150)]
OTHERS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(1, 200))] for _ in range(31)]
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=5)
SAMPLED = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, logprobs=5)
PARAMS = (GREEDY, SAMPLED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def load(folder: Path, form: str, **settings: Any) -> LLM:
    return LLM(folder, load_format="dummy", max_model_len=512, **{"threads": 1} | FORMATS[form] | settings)


def result(completion: Completion) -> tuple[list[int], list[tuple[float, Any]]]:
    """Returns all parts of a result that must be equal."""
    return completion.token_ids, [(entry.logprob, entry.top) for entry in completion.logprobs]


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[Any]]:
    """A weight format, and the result of the subject when it runs alone."""
    llm = load(folder, request.param)
    alone = [result(llm.generate([SUBJECT], params)[0]) for params in PARAMS]
    assert len(set(alone[0][0])) > 1, "a reply of one token would say little"
    return request.param, alone


Case = tuple[str, list[Any]]


@pytest.mark.parametrize("place", [17, *nightly([0, 31])])
def test_among_31_others(folder: Path, case: Case, place: int) -> None:
    form, alone = case
    llm = load(folder, form, max_num_seqs=32)
    for params, expected in zip(PARAMS, alone, strict=True):
        prompts = [*OTHERS[:place], SUBJECT, *OTHERS[place:]]
        assert result(llm.generate(prompts, params)[place]) == expected


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_every_chunk_size(folder: Path, case: Case, chunk: int) -> None:
    form, alone = case
    llm = load(folder, form, max_num_batched_tokens=chunk, max_num_seqs=1, enable_prefix_caching=False)
    assert [result(llm.generate([SUBJECT], params)[0]) for params in PARAMS] == alone


def test_cache_cold_and_warm(folder: Path, case: Case) -> None:
    form, alone = case
    llm = load(folder, form)
    for params, expected in zip(PARAMS, alone, strict=True):
        [cold], [warm] = llm.generate([SUBJECT], params), llm.generate([SUBJECT], params)
        assert result(cold) == result(warm) == expected
        assert warm.num_cached == 144, "the second round must read the cache"
    # a conversation that goes on where the last reply ended, in the middle of a block
    longer = [*SUBJECT, *alone[0][0], 9, 8, 7]
    [warm] = llm.generate([longer], GREEDY)
    assert warm.num_cached == len(SUBJECT) + NEW_TOKENS - 1
    [cold] = load(folder, form).generate([longer], GREEDY)
    assert result(warm) == result(cold)


@pytest.mark.parametrize("caching", [True, False])
def test_preempted(folder: Path, case: Case, caching: bool) -> None:
    form, alone = case
    number = 4 if FORMATS[form]["dtype"] == "float32" else 2
    page = 16 * 1 * 2 * 2 * 20 * number  # one attention layer, K and V, two heads of 20
    llm = load(
        folder, form, max_num_seqs=8, kv_cache_memory_bytes=36 * page, enable_prefix_caching=caching,
        max_num_batched_tokens=64,
    )  # fmt: skip
    for params, expected in zip(PARAMS, alone, strict=True):
        before = llm.core.scheduler.stats.num_preemptions_total
        prompts = [*OTHERS[:12], SUBJECT, *OTHERS[12:20]]
        assert result(llm.generate(prompts, params)[12]) == expected
        assert llm.core.scheduler.stats.num_preemptions_total > before


def test_threads(folder: Path, case: Case) -> None:
    form, alone = case
    llm = load(folder, form, threads=2)
    assert [result(llm.generate([SUBJECT], params)[0]) for params in PARAMS] == alone


def test_a_prompt_scored_whole_or_token_by_token(folder: Path, case: Case) -> None:
    form, alone = case
    tokens = [*SUBJECT, *alone[0][0]]
    score = SamplingParams(max_tokens=0, prompt_logprobs=5)
    [whole] = load(folder, form).generate([tokens], score)
    [single] = load(folder, form, max_num_batched_tokens=1, max_num_seqs=1).generate([tokens], score)
    assert whole.prompt_logprobs == single.prompt_logprobs
    generated = whole.prompt_logprobs[len(SUBJECT) :]
    assert [(entry.logprob, entry.top) for entry in generated if entry] == alone[0][1], "prefill is decode"
