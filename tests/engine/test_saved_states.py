"""Saved states in int8: a hit goes on from the rounded state, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from jamba_server.engine.cache.state_store import CompressedStates
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.llm import LLM, Completion
from tests.engine.test_exact import CONFIG, OTHERS, SUBJECT

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved_states")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def load(folder: Path, state_cache_dtype: str, **settings: Any) -> LLM:
    fixed: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "max_model_len": 512, "threads": 1}
    return LLM(folder, state_cache_dtype=state_cache_dtype, **fixed | {"max_num_seqs": 8} | settings)


def result(completion: Completion) -> tuple[list[int], list[Any]]:
    return completion.token_ids, completion.logprobs


def scores(completion: Completion) -> list[float]:
    return [entry.logprob for entry in completion.logprobs]


def rounded(states: Tensor) -> Tensor:
    """Returns states [..., S] rounded as int8 does: each number to a multiple of its channel's largest magnitude /
    127."""
    largest = states.abs().amax(-1, keepdim=True)
    steps = torch.full_like(largest, 127) / largest
    return torch.where(largest > 0, (states * steps).round() * (largest * (1 / 127)), 0)


def conversation(llm: LLM, *, between: Callable[[], object] = int) -> list[Completion]:
    """A prompt, the same again (a hit in its interior), and what follows its reply (a hit in the middle of a block).
    Both go on from states of the first run, after which `between` is called."""
    [first] = llm.generate([SUBJECT], GREEDY)
    between()
    [again] = llm.generate([SUBJECT], GREEDY)
    [longer] = llm.generate([[*SUBJECT, *first.token_ids, 9, 8, 7]], GREEDY)
    assert [first.num_cached, again.num_cached, longer.num_cached] == [0, 144, 169]
    return [first, again, longer]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_hit_goes_on_from_the_rounded_state(folder: Path, ahead: bool, dtype: str) -> None:
    """With the bits of an engine whose saved states somebody rounded by hand."""
    exact = load(folder, "auto", dtype=dtype)

    def round_states() -> None:
        ssm = exact.core.model_runner.storage.ssm
        ssm.copy_(rounded(ssm))

    expected = conversation(exact, between=round_states)
    found = conversation(load(folder, "int8", dtype=dtype, async_scheduling=ahead))
    assert list(map(result, found)) == list(map(result, expected))
    assert result(found[1]) != result(found[0]), "nothing was rounded"


def test_a_hit_is_near_to_what_is_computed_anew(folder: Path) -> None:
    """A rounding moves a number by 1/254 of its channel's largest at most. What that does to log-probabilities is about
    linear: noise ten times as large does ten times as much, which is the limit here."""
    cold = conversation(load(folder, "auto"))
    llm, random = load(folder, "auto"), torch.Generator().manual_seed(0)

    def shake() -> None:
        ssm = llm.core.model_runner.storage.ssm
        noise = torch.rand(ssm.shape, generator=random) * 2 - 1
        ssm.add_(noise * ssm.abs().amax(-1, keepdim=True) * (10 / 254))

    shaken, hits = conversation(llm, between=shake), conversation(load(folder, "int8"))
    for exact, far, near in list(zip(cold, shaken, hits, strict=True))[1:]:
        assert near.token_ids == exact.token_ids
        limit = max(abs(a - b) for a, b in zip(scores(exact)[:5], scores(far)[:5], strict=True))
        assert 0 < max(abs(a - b) for a, b in zip(scores(exact)[:5], scores(near)[:5], strict=True)) < limit


@pytest.mark.parametrize("ahead", [False, True])
def test_preemptions_and_aborts_leave_nothing_behind(folder: Path, ahead: bool) -> None:
    page = 16 * 1 * 2 * 2 * 20 * 4  # one attention layer, K and V, two heads of 20
    llm = load(
        folder, "int8", kv_cache_memory_bytes=36 * page, state_cache_memory_bytes=0, max_num_batched_tokens=64,
        async_scheduling=ahead,
    )  # fmt: skip
    core, random = llm.core, Random(1)
    assert core.info.num_saved_states == 2
    params = msgspec.structs.replace(GREEDY, max_tokens=60, logprobs=None)
    core.inbox.submit([Request(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(OTHERS[:20])])
    ended = {update.request_id for update in core.step().updates if update.finish_reason}
    while core.has_work:
        ended |= {update.request_id for update in core.step().updates if update.finish_reason}
        if random.random() < 0.02:
            core.inbox.abort([str(random.randrange(20))])
    assert len(ended) > 10
    cache, stats = core.scheduler.cache, core.scheduler.stats
    assert isinstance(cache.store, CompressedStates)
    assert stats.num_preemptions_total > 0
    assert (stats.kv_blocks_used, stats.state_slots_used) == (0, 0)
    llm.generate([[5]], GREEDY)  # a step that carries the last copies
    while core.has_work:
        core.step()
    assert sum(cache.store.places.refs) <= 1  # of the request that has just ended
    assert not any((*cache.slots.refs, *cache.pages.refs))


def test_exact_results_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch_invariant and state_cache_dtype 'int8' exclude each other"):
        load(folder, "int8", batch_invariant=True)


def test_memory_is_what_the_plan_says(folder: Path) -> None:
    core = load(folder, "int8", state_cache_memory_bytes=1 << 20).core
    storage, info = core.model_runner.storage, core.info
    assert storage.compressed is not None
    tensors = (storage.conv, storage.ssm, *storage.compressed)
    assert sum(tensor.nbytes for tensor in tensors) == info.state_bytes
    assert len(storage.compressed.values) == info.num_saved_states + 1
    assert len(storage.ssm) == info.num_state_slots + 1 == 1 + 8 + 4
    assert load(folder, "auto").core.model_runner.storage.compressed is None
