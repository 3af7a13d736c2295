"""An engine on 1, 2 and 3 stages: tokens and log-probabilities are equal whatever happens around a request."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.types import CacheUse, Request, SamplingParams
from tests.engine.parallel.engines import Reply, replies, running, step
from tests.engine.parallel.test_parallel_engine import GRAMMAR, GREEDY, PROMPTS, SAMPLED, contents, requests
from tests.engine.test_exact import CONFIG
from tests.nightly import nightly
from tests.synthetic_tokenizer import write_tokenizer

LAYERS = {"num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 2, "vocab_size": 1999}
DENSE: dict[str, Any] = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def write(folder: Path, **shape: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **LAYERS, **shape, "eos_token_id": [2, 519]}))
    write_tokenizer(folder, "reasoning")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers. With three stages, the first one has no attention layer; with four, one stage has
    no Mamba layer."""
    return write(tmp_path_factory.mktemp("stages"))


def config_of(folder: Path, stages: int, **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "load_format": "dummy", "threads": 1, "max_num_seqs": 4, "max_model_len": 256, "pipeline_parallel_size": stages
    }  # fmt: skip
    return EngineConfig(model=str(folder), **{**defaults, **settings})


def one_by_one(folder: Path, **settings: Any) -> dict[str, Any]:
    with running(config_of(folder, 1, enable_prefix_caching=False, **settings)) as core:
        found: dict[str, Reply] = {}
        for request in requests():
            found |= replies(core, [request])
        return contents(found)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """What one process answers, each request alone."""
    return one_by_one(folder)


@pytest.mark.parametrize("stages", [2, 4, *nightly([3])])
def test_together_with_a_cold_and_a_warm_cache(stages: int, folder: Path, expected: dict[str, Any]) -> None:
    with running(config_of(folder, stages, max_num_batched_tokens=48)) as core:
        assert contents(replies(core, requests())) == expected
        warm = replies(core, requests(prefix="again "))
        assert contents(warm, "again ") == expected
        assert warm["again 0"].num_cached == 64, "the second round must read the cache"
        assert (core.info.tensor_parallel_size, core.info.pipeline_parallel_size) == (1, stages)


def test_a_dense_model_with_one_kv_head(tmp_path: Path) -> None:
    """The head is tied to the embedding, so the last stage has a copy of it."""
    expected = one_by_one(write(tmp_path, **DENSE))
    for stages in (2, 3):
        with running(config_of(tmp_path, stages, max_num_batched_tokens=48)) as core:
            assert contents(replies(core, requests())) == expected
            assert contents(replies(core, requests(prefix="again ")), "again ") == expected


def test_stages_of_several_ranks(folder: Path) -> None:
    """Two stages with two ranks each compute what one process does that adds in the exact order."""
    expected = one_by_one(folder, tensor_parallel_exact=True)
    with running(config_of(folder, 2, tensor_parallel_size=2)) as core:
        assert contents(replies(core, requests())) == expected
        assert contents(replies(core, requests(prefix="again ")), "again ") == expected
        assert core.info.tensor_parallel_exact


def test_stages_of_a_device_map(folder: Path, expected: dict[str, Any]) -> None:
    devices = {"model": "cpu:1", "model.embed_tokens": 0, "model.layers.0": "cpu:0", "lm_head": 1}
    with running(config_of(folder, 1, device_map=devices)) as core:
        assert contents(replies(core, requests())) == expected
        assert core.info.pipeline_parallel_size == 2
        assert list(core.model_runner.model.parts.stage.layers) == [0]


def test_all_stages_have_work(folder: Path) -> None:
    """Of six replies, each of three steps in flight has two, although all prompts ran in the same step. A long prompt
    has a chunk in every step."""
    random = Random(0)
    prompts = [[random.randrange(3, 500) for _ in range(length)] for length in (*[12] * 6, 200)]
    params = msgspec.structs.replace(GREEDY, max_tokens=40)
    with running(config_of(folder, 3, max_num_seqs=8, max_num_batched_tokens=72)) as core:
        core.inbox.submit([Request(id=str(i), prompt=prompt, params=params) for i, prompt in enumerate(prompts[:6])])
        sizes = [sizes_of_step(core) for _ in range(20)]
        assert sizes[8:] == [[1, 1]] * 12, sizes
        core.inbox.submit([Request(id="long", prompt=prompts[6], params=params)])
        assert [sizes_of_step(core) for _ in range(3)] == [[1, 1, 72], [1, 1, 72], [1, 1, 56]]
        assert len(in_flight(core)) == 2
        while core.has_work:
            step(core)


def in_flight(core: EngineCore) -> Any:
    return core._in_flight  # pyright: ignore[reportPrivateUsage]


def sizes_of_step(core: EngineCore) -> list[int]:
    """Runs a step, and returns how many tokens of each sequence the newest step in flight has."""
    step(core)
    chunks = in_flight(core)[-1].output.chunks if in_flight(core) else ()
    return [chunk.end - chunk.start for chunk in chunks]


def test_preempted_and_aborted(folder: Path) -> None:
    """Pages run out while the replies grow, and some requests go."""
    long = msgspec.structs.replace(SAMPLED, max_tokens=30)
    asked = [Request(id=str(i), prompt=prompt, params=long) for i, prompt in enumerate(PROMPTS)]
    scored = msgspec.structs.replace(long, prompt_logprobs=1)
    asked.append(Request(id="scored", prompt=PROMPTS[3][:20], params=scored))
    with running(config_of(folder, 1)) as core:
        alone = {request.id: replies(core, [request])[request.id].content for request in asked}
        page = core.info.kv_bytes // (core.info.num_kv_blocks + 1)
    for stages in (2, 3):
        with running(config_of(folder, stages, kv_cache_memory_bytes=12 * page, max_model_len=104)) as core:
            gone = [Request(id=f"gone {i}", prompt=PROMPTS[i][:30], params=long) for i in range(2)]
            core.inbox.submit(gone)
            for _ in range(4):
                step(core)
            core.inbox.abort(["gone 0", "gone 1"])  # Steps with these requests are in flight.
            assert contents(replies(core, asked)) == alone
            assert core.scheduler.stats.num_preemptions_total > 0
            assert core.info.num_kv_blocks == 11
            assert core.scheduler.stats.kv_blocks_used == core.scheduler.stats.state_slots_used == 0


def test_a_grammar_that_cannot_be_compiled_and_a_pin(folder: Path, expected: dict[str, Any]) -> None:
    with running(config_of(folder, 2)) as core:
        bad = Request(id="bad", prompt=PROMPTS[0], params=SamplingParams(max_tokens=5, grammar="start: nothing"))
        assert replies(core, [bad])["bad"].finish_reason == "error"
        core.inbox.submit([Request(id="gone", prompt=PROMPTS[0], params=SamplingParams(max_tokens=5, grammar=GRAMMAR))])
        core.inbox.abort(["gone"])
        pinned = Request(id="pinned", prompt=PROMPTS[3], params=GREEDY, cache=CacheUse(pin_seconds=0.0))
        replies(core, [pinned])
        assert contents(replies(core, requests())) == expected


def test_vectors_and_compressed_states(folder: Path) -> None:
    none = SamplingParams(max_tokens=0)
    asked = [
        Request(id="last", prompt=PROMPTS[0], params=none, kind="embed"),
        Request(id="mean", prompt=PROMPTS[1], params=none, kind="embed", pooling="mean"),
        Request(id="score", prompt=PROMPTS[2], params=none, kind="score", targets=((7, 9), (11,))),
    ]
    found: list[Any] = []
    for stages in (1, 3):
        with running(config_of(folder, stages, state_cache_dtype="int8", max_num_batched_tokens=32)) as core:
            core.inbox.submit(asked)
            vectors = {}
            while core.has_work or not vectors:
                vectors |= {update.request_id: update.vector for update in step(core) if update.finish_reason}
            replies(core, requests())
            found.append((vectors, contents(replies(core, requests(prefix="again ")), "again ")))
    assert found[0] == found[1]
    assert all(found[0][0].values())
