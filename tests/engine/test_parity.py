"""The whole engine against transformers: many requests at once, small batches, few pages, cold and warm cache."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.llm import LLM, Completion
from tests.nightly import each_pair
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 7, "max_num_batched_tokens": 48, "threads": 1}
NUM_REQUESTS, NEW_TOKENS, MAX_PROMPT = 24, 6, 300


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Lengths from 1 to 300; every third prompt begins as the one before, so that the cache has something to find."""
    random = Random(0)
    lengths = [1, 2, 15, 16, 17, MAX_PROMPT] + [random.randint(1, MAX_PROMPT) for _ in range(NUM_REQUESTS - 6)]
    prompts: list[list[int]] = []
    for i, length in enumerate(lengths):
        shared = prompts[-1][: length // 2] if i % 3 == 2 else []
        prompts.append([*shared, *(random.randrange(3, vocab_size) for _ in range(length - len(shared)))])
    return prompts


def check(model: object, completions: list[Completion]) -> None:
    """Every token is the argmax of transformers' whole-prompt forward, every log-probability within 1e-3 of it."""
    for completion in completions:
        assert len(completion.token_ids) == NEW_TOKENS
        logits = oracle_logits(model, [*completion.prompt, *completion.token_ids])
        expected = logits.float().log_softmax(-1)[len(completion.prompt) - 1 : -1]
        assert completion.token_ids == expected.argmax(-1).tolist()
        ours = torch.tensor([entry.logprob for entry in completion.logprobs])
        theirs = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        for entry, row in zip(completion.logprobs, expected, strict=True):
            top = [row[token_id].item() for token_id, _ in entry.top]
            assert [logprob for _, logprob in entry.top] == pytest.approx(top, abs=1e-3)
            assert top == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_concurrent_requests_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **TINY_CONFIGS[name])
    llm = LLM(tmp_path, **SETTINGS, max_model_len=320)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
    prompts = make_prompts(llm.core.info.vocab_size)
    cold = llm.generate(prompts, params)
    check(model, cold)
    before = llm.core.scheduler.stats.prefix_hits_total
    warm = llm.generate(prompts, params)
    assert llm.core.scheduler.stats.prefix_hits_total > before, "the second round must read the cache"
    assert sum(c.num_cached for c in warm) > 0
    assert [c.token_ids for c in warm] == [c.token_ids for c in cold]
    check(model, warm)


@each_pair({"name": list(TINY_CONFIGS)[:3], "caching": (True, False)})
def test_few_pages_preempt_and_change_nothing(name: str, caching: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **TINY_CONFIGS[name])
    settings: dict[str, Any] = SETTINGS | {"max_model_len": 320}
    roomy = LLM(tmp_path, **settings)
    config = roomy.core.model_runner.model.config
    page = cache_layout(config, block_size=16, dtype="float32").num_bytes("page")
    llm = LLM(tmp_path, **settings, kv_cache_memory_bytes=24 * page, enable_prefix_caching=caching)
    assert llm.core.info.num_kv_blocks <= 24
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
    prompts = make_prompts(llm.core.info.vocab_size)
    for _ in range(2):  # cold, then warm
        check(model, llm.generate(prompts, params))
    stats = llm.core.scheduler.stats
    assert stats.num_preemptions_total > 0
    assert stats.kv_blocks_used == 0
    assert stats.state_slots_used == 0
    assert (stats.prefix_hits_total > 0) == caching


def test_prompt_logprobs_of_chunked_prompts(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **next(iter(TINY_CONFIGS.values())))
    llm = LLM(tmp_path, dtype="float32", max_num_seqs=3, max_num_batched_tokens=40, max_model_len=320, threads=1)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    for prompt in make_prompts(llm.core.info.vocab_size)[:8]:
        for _ in range(2):  # a scored prompt does not read the cache
            [completion] = llm.generate([prompt], params)
            assert completion.num_cached == 0
            assert completion.token_ids == []
            assert completion.finish_reason == "length"
            first, *rest = completion.prompt_logprobs
            assert first is None
            assert len(rest) == len(prompt) - 1
            expected = oracle_logits(model, prompt).float().log_softmax(-1)
            for position, entry in enumerate(rest):
                assert entry is not None
                assert entry.token_id == prompt[position + 1]
                assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-3)
                assert entry.top[0][0] == expected[position].argmax().item()


def test_interior_checkpoints_hold_the_states_of_runs_that_stopped_there(tmp_path: Path) -> None:
    """A 2,000-token prompt with four saved states takes as many steps as with none, and a request that continues from
    one of them reads the state that a run ending there leaves, to the bit (with the reference kernels, as near as
    matrix products over chunks of other lengths allow)."""
    save_tiny(tmp_path, **next(iter(TINY_CONFIGS.values())))
    random = Random(1)
    prompt = [random.randrange(3, 60) for _ in range(2000)]
    offsets = (400, 800, 1200, 1600)
    steps: list[int] = []
    for save_positions in ((), offsets):
        llm = LLM(tmp_path, dtype="float32", max_num_batched_tokens=512, max_model_len=2048, max_num_seqs=2, threads=1)
        run(llm, prompt, save_positions)
        steps.append(llm.core.scheduler.stats.num_steps_total)
        cache, storage = llm.core.scheduler.cache, llm.core.model_runner.storage
    assert steps[0] == steps[1]
    for offset in offsets:
        alone = LLM(
            tmp_path, dtype="float32", max_num_batched_tokens=512, max_model_len=2048, max_num_seqs=2, threads=1
        )
        run(alone, prompt[:offset], ())
        saved, stopped = (state_at(x, prompt[:offset]) for x in (llm, alone))
        conv, ssm = storage.conv[saved], storage.ssm[saved]
        assert torch.equal(conv, alone.core.model_runner.storage.conv[stopped])
        tolerance = 0.0 if llm.core.info.kernels["linear"] == "cpu" else 1e-5
        torch.testing.assert_close(ssm, alone.core.model_runner.storage.ssm[stopped], atol=tolerance, rtol=tolerance)
    assert cache.store.num_saved >= len(offsets)


def run(llm: LLM, prompt: list[int], save_positions: tuple[int, ...]) -> None:

    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    llm.core.inbox.submit([Request(id="r", prompt=prompt, params=params, save_positions=save_positions)])
    llm.core.step()
    while llm.core.has_work:
        llm.core.step()


def state_at(llm: LLM, prefix: list[int]) -> int:
    """Returns the slot that holds the state after `prefix`."""

    cache = llm.core.scheduler.cache
    seq = Sequence.of(Request(id="x", prompt=[*prefix, 3], params=SamplingParams()), arrival=0, now=0.0)
    hit = cache.match(seq)
    assert hit.num_tokens == len(prefix)
    assert hit.place is not None
    return hit.place
