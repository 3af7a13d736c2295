"""Vectors: equal to transformers' hidden states, scores and log-probabilities, and `==` whatever runs around them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ModelCannot
from jamba_server.engine.graphs import StepGraphs
from jamba_server.engine.pooling.sums import LIMIT_BITS, ROWS, fraction_bits, launch_sums, mean_of
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG
from tests.engine.vectors import run, wanted
from tests.tiny import save_tiny

RANDOM = Random(8)
# the targets of a request for log-probabilities: several ids after one position, then one after each of the next three
TARGETS = ((3, 11, 40), (5,), (6,), (9,))
KINDS: dict[str, dict[str, Any]] = {
    "last": {"kind": "embed"},
    "mean": {"kind": "embed", "pooling": "mean"},
    "score": {"kind": "score", "targets": TARGETS},
}
CLASSIFIER = CONFIG | {"architectures": ["JambaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
SUBJECT = [RANDOM.randrange(3, 500) for _ in range(150)]
OTHERS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(4, 90))] for _ in range(11)]
TEXT = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


# The oracle is transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_hidden_states_and_logprobs_equal_transformers(chunk: int, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path)
    prompts = [[RANDOM.randrange(3, 64) for _ in range(length)] for length in (1, 4, 19, 37)]
    llm = LLM(tmp_path, max_num_batched_tokens=chunk, max_model_len=64, threads=1)
    last, mean = llm.embed(prompts, use_activation=False), llm.embed(prompts, pooling="mean", use_activation=False)
    scores = run(llm, [wanted(prompt, kind="score", targets=TARGETS) for prompt in prompts[1:]])
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = oracle.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].numpy()
            logprobs = oracle(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1).numpy()
        assert np.abs(last[number] - hidden[-1]).max() < 1e-4
        assert np.abs(mean[number] - hidden.mean(axis=0)).max() < 1e-4
        if number:
            expected = [logprobs[len(prompt) - 4 + i, id_] for i, ids in enumerate(TARGETS) for id_ in ids]
            assert np.abs(np.frombuffer(scores[number - 1], "<f4") - expected).max() < 1e-4


@pytest.mark.parametrize(("num_labels", "bias"), [(1, False), (3, True)])
def test_scores_equal_transformers(num_labels: int, bias: bool, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, architecture="JambaForSequenceClassification", num_labels=num_labels)
    if bias:  # transformers' head has none, but another trainer may add one
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {"score.bias": torch.arange(float(num_labels))}, tmp_path / "model.safetensors")
    prompts = [[RANDOM.randrange(3, 64) for _ in range(length)] for length in (1, 19, 37)]
    for chunk in (1, 7, 64):
        llm = LLM(tmp_path, max_num_batched_tokens=chunk, max_model_len=64, threads=1)
        found = [np.frombuffer(each, "<f4") for each in run(llm, [wanted(p, kind="classify") for p in prompts])]
        for prompt, scores in zip(prompts, found, strict=True):
            with torch.no_grad():
                expected = oracle(torch.tensor([prompt])).logits[0].numpy() + (np.arange(num_labels) if bias else 0)
            assert np.abs(scores - expected).max() < 1e-4
    assert llm.core.info.labels == tuple(f"LABEL_{i}" for i in range(num_labels))
    chosen = llm.classify([[5, 6, 7]])[0]
    assert len(chosen) == num_labels
    assert num_labels == 1 or sum(chosen) == pytest.approx(1)
    with pytest.raises(ModelCannot, match="is a classifier"):
        llm.generate([[5, 6, 7]], max_tokens=1)


# The same bits, whatever happens around a request ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {"language model": tmp_path_factory.mktemp("text"), "classifier": tmp_path_factory.mktemp("classes")}
    for path, config in zip(folders.values(), (CONFIG, CLASSIFIER), strict=True):
        (path / "config.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module", params=["language model", "classifier"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def text_model(folders: dict[str, Path]) -> Path:
    return folders["language model"]


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, load_format="dummy", max_model_len=512, threads=1, **settings)


def subjects(llm: LLM) -> list[Request]:
    """One request of each kind that the model serves."""
    kinds = KINDS if not llm.core.info.labels else {**KINDS, "score": {"kind": "classify"}}
    return [wanted(SUBJECT, **fields) for fields in kinds.values()]


def one_by_one(folder: Path) -> list[bytes]:
    llm = load(folder, enable_prefix_caching=False)
    return [run(llm, [request])[0] for request in subjects(llm)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[bytes]:
    return one_by_one(folder)


@pytest.fixture(scope="module")
def alone_text(text_model: Path) -> list[bytes]:
    return one_by_one(text_model)


def submit_texts(llm: LLM, count: int) -> None:
    """Other requests, which generate text if the model can."""
    kind = "classify" if llm.core.info.labels else "generate"
    params = SamplingParams(max_tokens=0) if llm.core.info.labels else TEXT
    requests = [Request(id=f"t{i}", prompt=OTHERS[i], params=params, kind=kind) for i in range(count)]
    llm.core.inbox.submit(requests)


def run_among(llm: LLM, requests: list[Request], count: int) -> list[bytes]:
    """The vectors of requests that run among others."""
    submit_texts(llm, count)
    names = [f"s{i}" for i in range(len(requests))]
    named = [msgspec.structs.replace(request, id=name) for name, request in zip(names, requests, strict=True)]
    llm.core.inbox.submit(named)
    found: dict[str, bytes] = {}
    while llm.core.has_work or len(found) < len(names):
        found |= {u.request_id: u.vector for u in llm.core.step().updates if u.vector is not None}
    return [found[name] for name in names]


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_every_chunk_size(folder: Path, alone: list[bytes], chunk: int) -> None:
    llm = load(folder, max_num_batched_tokens=chunk, max_num_seqs=2)
    assert run(llm, subjects(llm)) == alone


@pytest.mark.parametrize("ahead", [False, True])
def test_among_others(folder: Path, alone: list[bytes], ahead: bool) -> None:
    llm = load(folder, max_num_batched_tokens=64, async_scheduling=ahead)
    for _ in range(2):  # cold, then with all prefixes in the cache
        assert run_among(llm, subjects(llm), 8) == alone
    graphs = llm.core.model_runner.graphs
    if not ahead and not llm.core.info.labels:
        assert isinstance(graphs, StepGraphs)
        assert graphs.captured, "the decode steps of the others run as graphs"


def test_cached(folder: Path, alone: list[bytes]) -> None:
    llm = load(folder)
    run(llm, [wanted(SUBJECT, kind="embed")])
    cached: dict[str, int | None] = {}
    for number, request in enumerate(subjects(llm)):
        before = llm.core.scheduler.stats.prefix_hits_total
        assert run(llm, [request]) == [alone[number]]
        cached[request.kind + request.pooling] = llm.core.scheduler.stats.prefix_hits_total - before
    # a mean needs the hidden states of all tokens, which are not in the cache
    assert cached.pop("embedmean") == 0
    assert set(cached.values()) == {144}


def test_a_fork_continues_exactly_after_the_prompt(text_model: Path) -> None:
    """The state after the last token is saved, although that is no page boundary."""
    llm = load(text_model)
    [cold] = run(load(text_model), [wanted([*SUBJECT, 7, 8], kind="score", targets=((9,), (10,)))])
    run(llm, [wanted(SUBJECT, kind="score", targets=((7,),))])
    before = llm.core.scheduler.stats.prefix_hits_total
    assert run(llm, [wanted([*SUBJECT, 7, 8], kind="score", targets=((9,), (10,)))]) == [cold]
    assert llm.core.scheduler.stats.prefix_hits_total - before == len(SUBJECT)


def test_preempted(text_model: Path, alone_text: list[bytes]) -> None:
    page = 16 * 2 * 2 * 20 * 2  # one attention layer: K and V, two heads of 20 numbers of two bytes
    llm = load(text_model, max_num_seqs=8, kv_cache_memory_bytes=36 * page, max_num_batched_tokens=4)
    llm.core.scheduler.joining.min_saved = len(SUBJECT) + 1  # no request waits for another one with the same prompt
    cache, preempted = llm.core.scheduler.cache, list[str]()
    free = cache.free

    def recorded(seq: Sequence) -> None:
        if 0 < seq.num_computed < seq.num_prompt:
            preempted.append(seq.request.id)
        free(seq)

    cache.free = recorded
    long = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    llm.core.inbox.submit([Request(id=f"t{i}", prompt=SUBJECT[i : i + 9], params=long) for i in range(5)])
    for _ in range(12):
        llm.core.step()
    assert run_among(llm, subjects(llm), 0) == alone_text
    assert {"s1", "s2"} <= set(preempted), "those that need several chunks must have lost their pages in mid-prompt"


def test_an_aborted_request_leaves_nothing(folder: Path) -> None:
    llm = load(folder, max_num_batched_tokens=16)
    pooler = llm.core.model_runner.pooler
    request = wanted(SUBJECT, **KINDS["mean"])
    llm.core.inbox.submit([request])
    llm.core.step()
    assert pooler.num_kept == 1
    llm.core.inbox.abort([request.id])
    llm.core.step()
    gc.collect()
    assert (pooler.num_kept, llm.core.has_work) == (0, False)


async def test_a_killed_engine_computes_vectors_again(text_model: Path, alone_text: list[bytes]) -> None:
    config = EngineConfig(
        model=str(text_model), device="cpu", load_format="dummy", max_model_len=512, max_num_seqs=2,
        max_num_batched_tokens=16, threads=1,
    )  # fmt: skip
    engine = EngineClient(config)
    await engine.start()
    first = engine.pid
    assert first is not None
    requests = [msgspec.structs.replace(wanted(SUBJECT, **fields), id=name) for name, fields in KINDS.items()]
    found: dict[str, TokenUpdate] = {}
    async with engine.generate(requests) as updates, asyncio.timeout(60):
        os.kill(first, signal.SIGKILL)
        async for update in updates:
            found[update.request_id] = update
    assert engine.pid != first
    await engine.close()
    assert [found[request.id].vector for request in requests] == alone_text


# Exact sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 16, 100, 262_144, 1 << 30])
def test_a_sum_of_the_largest_numbers_fits(max_tokens: int) -> None:
    bits = fraction_bits(max_tokens)
    assert max_tokens * 2**LIMIT_BITS * 2**bits <= 2**62 < 2 * max_tokens * 2**LIMIT_BITS * 2 ** (bits + 1)


def test_sums_are_exact_in_every_order_and_partition() -> None:
    bits = fraction_bits(262_144)
    rows = torch.randn(ROWS + 70, 9, generator=torch.Generator().manual_seed(1)) * 100
    whole = launch_sums(rows, bits).numpy()
    pieces = sum(launch_sums(rows[torch.tensor(part)], bits).numpy() for part in ([5], range(5), range(6, len(rows))))
    assert (whole == pieces).all()
    exact = [sum(map(Fraction, column)) / len(rows) for column in rows.T.tolist()]
    found = np.frombuffer(mean_of(whole, len(rows), bits), "<f4")
    assert max(abs(Fraction(float(a)) - b) for a, b in zip(found, exact, strict=True)) < Fraction(1, 10**5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**LIMIT_BITS * 1.01])
def test_what_cannot_be_summed_is_not_hidden(bad: float) -> None:
    rows = torch.zeros(3, 2)
    rows[1, 0] = bad
    assert np.isnan(np.frombuffer(mean_of(launch_sums(rows, 20).numpy(), 3, 20), "<f4")).all()
