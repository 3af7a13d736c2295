"""Graphs without a GPU: a double that repeats what it recorded, upon the same buffers, and the CPU's own. `==` the
eager engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.cache.graph_sizes import GraphKey, GraphSizes
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.graphs import CudaGraph, DecodeGraphs, why_no_graphs
from jamba_server.engine.staging import ALIGNMENT, cut, pack, packed_bytes
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels.table import OPS
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, FORMATS, result

RANDOM = Random(2)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(1, 60))] for _ in range(19)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, top_k=40, seed=3, logprobs=2)
MAX_NUM_SEQS = 18


class Recorded:
    """A graph that repeats a function. It knows no other inputs than the buffers that the function saw when it was
    recorded, as a CUDA graph does."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self._log.append("capture")
        self._run = run
        return run()

    def replay(self) -> Tensor:
        self._log.append("replay")
        return self._run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    (path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 4096}))
    return path


def load(folder: Path, **settings: Any) -> LLM:
    defaults = {"threads": 1, "max_num_seqs": MAX_NUM_SEQS, "max_model_len": 512, "enforce_eager": True}
    return LLM(folder, load_format="dummy", **defaults | settings)


def with_graphs(llm: LLM) -> list[str]:
    """Gives the engine graphs, and returns the list of what happens to them."""
    log: list[str] = []
    runner, info = llm.core.model_runner, llm.core.info
    sizes = GraphSizes(info.max_num_seqs, info.max_model_len, "cuda")
    runner.graphs = DecodeGraphs(runner.model, runner.storage, sizes=sizes, new_graph=lambda: Recorded(log))
    return log


@pytest.mark.parametrize("ahead", [False, True])
def test_replays_equal_eager_steps_for_every_number_of_rows(folder: Path, ahead: bool) -> None:
    eager, graphed = load(folder), load(folder, async_scheduling=ahead)
    log = with_graphs(graphed)
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 18, 19):
        for params in (GREEDY, SAMPLED):
            expected = [result(completion) for completion in eager.generate(PROMPTS[:count], params)]
            assert [result(completion) for completion in graphed.generate(PROMPTS[:count], params)] == expected
    assert log.count("capture") == len([1, 2, 4, 8, 16, 18])
    assert log.count("replay") > 100


def test_padding_touches_nothing_that_a_sequence_owns(folder: Path) -> None:
    """Both engines hand out the same pages and slots, so all of them must hold the same bits."""
    eager, graphed = load(folder), load(folder)
    log = with_graphs(graphed)
    for llm in (eager, graphed):
        storage = llm.core.model_runner.storage
        for tensor in (storage.kv, storage.conv, storage.ssm):
            tensor.fill_(7.0)
        llm.generate(PROMPTS[:5], GREEDY)
        llm.generate(PROMPTS[5:16], GREEDY)
    assert "replay" in log
    ours, theirs = graphed.core.model_runner.storage, eager.core.model_runner.storage
    for name in ("kv", "conv", "ssm"):
        padded, plain = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(padded[1:], plain[1:])
        assert not torch.equal(padded[0], plain[0]), "the padding must go somewhere"


def test_a_context_that_outgrows_its_graph_goes_on_in_the_next(folder: Path) -> None:
    settings = {"max_model_len": 2200, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    prompts = [PROMPTS[0], [RANDOM.randrange(3, 500) for _ in range(2042)]]
    eager, graphed = load(folder, **settings), load(folder, **settings)
    log = with_graphs(graphed)
    expected = [result(completion) for completion in eager.generate(prompts, GREEDY)]
    assert [result(completion) for completion in graphed.generate(prompts, GREEDY)] == expected
    assert log.count("capture") == 3  # one row and two up to 2048 tokens, two beyond


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_replays_of_the_cpus_own_graphs_equal_eager_steps(tmp_path: Path, form: str, tied: bool) -> None:
    config = CONFIG | {"max_position_embeddings": 1024, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = FORMATS[form] | {"max_model_len": 700}
    eager, graphed = load(tmp_path, **settings), load(tmp_path, **settings | {"enforce_eager": False})
    graphs = graphed.core.model_runner.graphs
    if graphs is None:
        pytest.skip(f"no graphs on this machine: {why_no_graphs(graphed.core.info.kernels, 'cpu')}")
    long = [RANDOM.randrange(3, 500) for _ in range(506)]  # its replies need room for more than 512 tokens
    for prompts in (PROMPTS[:1], PROMPTS[:7], [long, *PROMPTS[:4]], PROMPTS[:7], [long]):
        for params in (GREEDY, SAMPLED):
            expected = [result(completion) for completion in eager.generate(prompts, params)]
            assert [result(completion) for completion in graphed.generate(prompts, params)] == expected
    assert {GraphKey(1, 512), GraphKey(1, 700), GraphKey(7, 512), GraphKey(5, 700)} <= graphs.captured


def test_an_interrupted_capture_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, expected = load(folder, enforce_eager=False), load(folder).generate(PROMPTS[:2], GREEDY)
    forward = llm.core.model_runner.model.forward

    def interrupted(batch: ForwardBatch, storage: CacheStorage) -> Tensor:
        if batch.prefills is None:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return forward(batch, storage)

    monkeypatch.setattr(llm.core.model_runner.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], GREEDY)
    completions = llm.generate(PROMPTS[:2], GREEDY)
    assert [result(completion) for completion in completions] == [result(completion) for completion in expected]


def test_steps_with_prompts_run_without_a_graph(folder: Path) -> None:
    llm = load(folder)
    log = with_graphs(llm)
    llm.generate(PROMPTS[:6], SamplingParams(max_tokens=1, temperature=0.0))
    assert log == []


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_num_seqs", "rows"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_the_ladder_ends_at_the_largest_batch(max_num_seqs: int, rows: list[int]) -> None:
    assert GraphSizes(max_num_seqs, 100, "cuda").rows == rows


def test_contexts_end_at_the_longest() -> None:
    assert GraphSizes(1, 100, "cuda").contexts == [100]
    assert GraphSizes(1, 2049, "cuda").contexts == [2048, 2049]
    assert GraphSizes(1, 262_144, "cuda").contexts == [2048, 8192, 32_768, 131_072, 262_144]


def test_the_smallest_graph_with_room_is_taken() -> None:
    sizes = GraphSizes(256, 262_144, "cuda")
    assert sizes.key(1, 1) == GraphKey(1, 2048)
    assert sizes.key(5, 2049) == GraphKey(8, 8192)
    assert sizes.key(249, 32_768) == GraphKey(256, 32_768)
    assert sizes.key(257, 1) is None
    assert sizes.key(249, 262_144) == GraphKey(256, 262_144)
    assert {sizes.key(rows, context) for rows, context in sizes.keys} == set(sizes.keys)


def test_all_graphs_together_take_a_small_part_of_a_gpu() -> None:
    # the 3B model's widest layer in float32
    assert 0 < GraphSizes(256, 262_144, "cuda").graph_bytes(4 * 40_960) < 1024**3
    assert GraphSizes(1, 2048, "cuda").graph_bytes(1000) == (4 + 64) * 1024**2 + 1000


def test_on_a_cpu_there_is_a_graph_for_any_number_of_rows() -> None:
    sizes = GraphSizes(64, 262_144, "cpu")
    assert [sizes.key(rows, 512) for rows in (1, 13, 64)] == [(1, 512), (13, 512), (64, 512)]
    assert sizes.key(3, 513) == GraphKey(3, 1024)
    assert sizes.key(64, 16_384) == GraphKey(64, 16_384)
    assert sizes.key(64, 16_385) is None


def test_kernels_that_cannot_be_captured_are_named() -> None:
    names = dict.fromkeys(OPS, "cpu")
    assert why_no_graphs(names | {"attention_prefill": "reference", "sample": "reference"}, "cpu") is None
    assert why_no_graphs(names | {"linear": "reference"}, "cpu") == "linear=reference cannot be captured"
    names = dict.fromkeys(OPS, "triton")
    assert why_no_graphs(names, "cuda") is None
    assert why_no_graphs({**names, "linear": "reference"}, "cuda") is None
    reason = why_no_graphs({**names, "attention_decode": "reference", "run_experts": "reference"}, "cuda")
    assert reason == "attention_decode=reference, run_experts=reference cannot be captured"


def test_a_capture_that_fails_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuse(*args: object, **kwargs: object) -> Generator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with pytest.raises(RuntimeError, match=r"of 3 sequences could not be captured \(operation not .*--enforce-eager"):
        CudaGraph(pool=None).capture(lambda: torch.zeros(3, 8))


# Staging ----------------------------------------------------------------------------------------------------------


def test_packed_arrays_come_back_aligned_and_equal() -> None:
    arrays = [
        np.arange(5),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.zeros((3, 0), dtype=np.int32),
        np.array([True, False, True]),
        np.array([[0.5, -2.0]], dtype=np.float32),
    ]
    packed = pack(arrays, torch.empty(packed_bytes(arrays), dtype=torch.uint8))
    assert packed.numel() == packed_bytes(arrays)
    tensors = cut(packed, arrays)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert (tensor.data_ptr() - packed.data_ptr()) % ALIGNMENT == 0


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_the_input_buffer_has_room_for_every_graph(block_size: int) -> None:
    sizes = GraphSizes(70, 9000, "cuda")
    for rows, context in sizes.keys:
        tables = np.zeros((rows, -(-context // block_size)), dtype=np.int32)
        long, short = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int32)
        assert packed_bytes([long, long, short, tables, short, long]) <= sizes.input_bytes(block_size)
