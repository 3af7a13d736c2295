"""However a request uses the prefix cache, it gets the same tokens and log-probabilities, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jamba_server.engine.types import CacheUse, Request, SamplingParams, TokenUpdate
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG

RANDOM = Random(11)
STEM = [RANDOM.randrange(3, 500) for _ in range(150)]
PROMPTS = {
    name: [*STEM[:shared], *(RANDOM.randrange(3, 500) for _ in range(own))]
    for name, shared, own in (("a", 150, 9), ("b", 150, 1), ("c", 97, 30), ("d", 150, 150), ("short", 7, 3))
}
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True, logprobs=3)
Result = tuple[list[int], list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache_exact")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def load(folder: Path, **settings: Any) -> LLM:
    sizes = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "bfloat16"}
    return LLM(folder, load_format="dummy", threads=1, **sizes | settings)


def results(llm: LLM, cache: CacheUse, *, name: str = "", together: bool = True) -> tuple[dict[str, Result], int]:
    """The tokens and log-probabilities of all prompts, by name, and the number of cached prompt tokens."""
    found: dict[str, Result] = {prompt: ([], []) for prompt in PROMPTS}
    requests = [
        Request(id=f"{prompt}-{name}", prompt=tokens, params=PARAMS, cache=cache) for prompt, tokens in PROMPTS.items()
    ]
    num_cached = 0
    for batch in [requests] if together else [[request] for request in requests]:
        llm.core.inbox.submit(batch)
        while llm.core.inbox.has_submitted or llm.core.has_work:
            for update in llm.core.step().updates:
                take(found, update)
                num_cached += update.num_cached or 0
    return found, num_cached


def take(found: dict[str, Result], update: TokenUpdate) -> None:
    tokens, logprobs = found[update.request_id.partition("-")[0]]
    tokens.extend(update.token_ids)
    logprobs.extend((entry.logprob, entry.top) for entry in update.logprobs)


@pytest.mark.parametrize("ahead", [False, True])
def test_cold_cached_pinned_and_waited_for(folder: Path, ahead: bool) -> None:
    cold, num_cached = results(load(folder, enable_prefix_caching=False), CacheUse(), together=False)
    assert num_cached == 0
    llm = load(folder, async_scheduling=ahead)
    for name, cache, waits, hits in (
        ("nothing left behind", CacheUse(write=False), False, False),
        ("nothing read", CacheUse(read=False, pin_seconds=0.001), False, False),
        ("read", CacheUse(explain=True, pin_seconds=100), False, True),
        ("pinned", CacheUse(explain=True), False, True),
    ):
        before = llm.core.scheduler.stats.num_joined_total
        found, num_cached = results(llm, cache, name=name)
        assert found == cold
        assert (num_cached > 0) == hits
        assert (llm.core.scheduler.stats.num_joined_total > before) == waits
    assert llm.core.scheduler.stats.pinned_states > 0
    llm = load(folder, async_scheduling=ahead)
    found, num_cached = results(llm, CacheUse())
    assert found == cold
    assert num_cached >= 2 * 144 + 96
    assert llm.core.scheduler.stats.num_joined_total >= 3
