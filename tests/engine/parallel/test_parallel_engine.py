"""An engine on 1, 2 and 4 ranks: tokens and log-probabilities are equal whatever happens around a request."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.types import CacheUse, Request, SamplingParams
from tests.engine.parallel.engines import Reply, replies, running, step
from tests.engine.test_exact import CONFIG
from tests.nightly import nightly
from tests.synthetic_tokenizer import write_tokenizer

RANDOM = Random(3)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(length)] for length in (70, 40, 55, 33)]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
SAMPLED = SamplingParams(max_tokens=6, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, logprobs=3)
GRAMMAR = LLMatcher.grammar_from_regex("(the |hello |[a-z]{1,3} ){3,9}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few layers, one of each kind, with sizes that are multiples of no large power of two."""
    path = tmp_path_factory.mktemp("ranks")
    layers = {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2}
    (path / "config.json").write_text(json.dumps({**CONFIG, **layers, "vocab_size": 1999, "eos_token_id": [2, 519]}))
    write_tokenizer(path, "reasoning")
    return path


def config_of(folder: Path, size: int, **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "load_format": "dummy", "threads": 1, "max_num_seqs": 4, "max_model_len": 256,
        "tensor_parallel_size": size, "tensor_parallel_exact": True,
    }  # fmt: skip
    return EngineConfig(model=str(folder), **{**defaults, **settings})


def requests(*, prefix: str = "", **changes: Any) -> list[Request]:
    """Requests of all kinds, some of them of one group."""
    plain = [
        Request(id=f"{prefix}{i}", prompt=prompt, params=GREEDY if i % 2 else SAMPLED)
        for i, prompt in enumerate(PROMPTS)
    ]
    grammar = SamplingParams(max_tokens=12, temperature=1.0, seed=5, grammar=GRAMMAR)
    choices = [
        Request(id=f"{prefix}n{i}", prompt=PROMPTS[0][:50], params=SAMPLED, group=f"{prefix}n", index=i) for i in (0, 1)
    ]
    scored = msgspec.structs.replace(GREEDY, prompt_logprobs=2, max_tokens=2)
    return [
        *plain,
        *choices,
        Request(id=f"{prefix}grammar", prompt=PROMPTS[1], params=grammar),
        Request(id=f"{prefix}scored", prompt=PROMPTS[2], params=scored),
    ]


def contents(found: dict[str, Reply], prefix: str = "") -> dict[str, Any]:
    return {name.removeprefix(prefix): reply.content for name, reply in found.items()}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """What one rank answers, each request alone."""
    with running(config_of(folder, 1, enable_prefix_caching=False)) as core:
        found: dict[str, Reply] = {}
        for request in requests():
            found |= replies(core, [request])
        return contents(found)


@pytest.mark.parametrize("size", [2, *nightly([4])])
def test_together_with_a_cold_and_a_warm_cache(size: int, folder: Path, expected: dict[str, Any]) -> None:
    with running(config_of(folder, size, max_num_batched_tokens=48)) as core:
        assert contents(replies(core, requests())) == expected
        warm = replies(core, requests(prefix="again "))
        assert contents(warm, "again ") == expected
        assert warm["again 0"].num_cached == 64, "the second round must read the cache"
        assert core.info.tensor_parallel_size == size


def test_a_grammar_that_cannot_be_compiled_and_an_abort(folder: Path, expected: dict[str, Any]) -> None:
    with running(config_of(folder, 2)) as core:
        bad = Request(id="bad", prompt=PROMPTS[0], params=SamplingParams(max_tokens=5, grammar="start: nothing"))
        assert replies(core, [bad])["bad"].finish_reason == "error"
        grammar = Request(id="gone", prompt=PROMPTS[0], params=SamplingParams(max_tokens=5, grammar=GRAMMAR))
        core.inbox.submit([grammar, Request(id="also gone", prompt=PROMPTS[0], params=GREEDY)])
        core.inbox.abort(["gone", "also gone"])  # The requests are aborted before a step has taken them.
        pinned = Request(id="pinned", prompt=PROMPTS[3], params=GREEDY, cache=CacheUse(pin_seconds=0.0))
        replies(core, [pinned])
        running_one = Request(id="running", prompt=PROMPTS[1], params=msgspec.structs.replace(GREEDY, max_tokens=50))
        core.inbox.submit([running_one])
        for _ in range(3):
            step(core)
        core.inbox.abort(["running"])
        assert contents(replies(core, requests())) == expected


def test_preempted(folder: Path) -> None:
    """Pages run out while the replies grow."""
    page = 16 * 2 * 1 * 20 * 2  # one attention layer, K and V, one of two heads of 20
    long = msgspec.structs.replace(SAMPLED, max_tokens=30)
    asked = [Request(id=str(i), prompt=prompt, params=long) for i, prompt in enumerate(PROMPTS)]
    with running(config_of(folder, 1)) as core:
        alone = {request.id: replies(core, [request])[request.id].content for request in asked}
    config = config_of(folder, 2, kv_cache_memory_bytes=12 * page, max_model_len=104)
    with running(config) as core:
        assert contents(replies(core, asked)) == alone
        assert core.scheduler.stats.num_preemptions_total > 0
        assert core.info.num_kv_blocks == 11


def test_compressed_states_and_a_classifier_of_labels(folder: Path) -> None:
    """With compressed states, hits are not exact, but they are the same on all numbers of ranks."""
    found: list[Any] = []
    for size in (1, 2):
        with running(config_of(folder, size, state_cache_dtype="int8")) as core:
            replies(core, requests())
            found.append(contents(replies(core, requests(prefix="again ")), "again "))
    assert found[0] == found[1]


def test_vectors(folder: Path) -> None:
    vectors: list[bytes | None] = []
    params = SamplingParams(max_tokens=0)
    for size in (1, 2):
        with running(config_of(folder, size)) as core:
            core.inbox.submit([Request(id="v", prompt=PROMPTS[0], params=params, kind="embed")])
            vectors += [update.vector for _ in range(3) for update in step(core) if update.vector is not None]
    assert len(vectors) == 2
    assert vectors[0] == vectors[1]


def test_sums_in_any_order(folder: Path, expected: dict[str, Any]) -> None:
    """Without the exact order, the first log-probabilities differ by rounding errors only."""
    with running(config_of(folder, 2, tensor_parallel_exact=False)) as core:
        found = contents(replies(core, requests()))
    first, other = found["1"][1][0], expected["1"][1][0]
    assert first != other
    assert first.logprob == pytest.approx(other.logprob, abs=0.1)
