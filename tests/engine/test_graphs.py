"""Graphs without a GPU: a stand-in that repeats a recorded function on the same buffers, and the CPU's own graphs. The
results must equal those of an engine without graphs, bit for bit."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch, table_arrays
from jamba_server.engine.cache.graph_sizes import BYTES_PER_GRAPH, SAVES_PER_PROMPT, GraphKey, GraphSizes
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.graphs import CudaGraph, StepGraphs, captures_prompts, why_no_graphs
from jamba_server.engine.scheduler import Chunk
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.staging import ALIGNMENT, cut, pack, packed_bytes
from jamba_server.engine.start.memory import DummySteps
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.kernels.table import OPS
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, result

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


def with_graphs(llm: LLM, *, mixed: bool = False, tables: bool = True, **more: Any) -> list[str]:
    """Gives the engine graphs and page tables as on a GPU, and returns the list of what happens to the graphs."""
    log: list[str] = []
    runner, info = llm.core.model_runner, llm.core.info
    sizes = GraphSizes(info.max_num_seqs, info.max_model_len, "cuda", mixed=mixed)
    if tables:
        runner.tables = DeviceTables(info.max_num_seqs, -(-info.max_model_len // info.block_size), runner.device)
    runner.graphs = StepGraphs(
        runner.model, runner.storage, sizes=sizes, new_graph=lambda: Recorded(log), tables=runner.tables, **more
    )
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


def test_steps_with_prompts_run_without_a_graph_where_their_kernels_cannot_be_captured(folder: Path) -> None:
    llm = load(folder)
    log = with_graphs(llm)
    for _ in range(3):
        llm.generate(PROMPTS[:6], SamplingParams(max_tokens=1, temperature=0.0))
    assert log == []
    assert not captures_prompts(dict.fromkeys(OPS, "triton") | {"selective_scan": "reference"}, "cuda")
    assert captures_prompts(dict.fromkeys(OPS, "triton") | {"attention_prefill": "torch"}, "cuda")


# Steps with prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_replays_of_steps_with_prompts_equal_eager_steps(folder: Path, ahead: bool, tables: bool) -> None:
    """Long prompts run in chunks beside replies, states are saved within chunks, and prefixes come from the cache."""
    settings = {"max_num_batched_tokens": 40, "max_num_seqs": 6}
    eager, graphed = load(folder, **settings), load(folder, **settings, async_scheduling=ahead)
    log = with_graphs(graphed, mixed=True, tables=tables)
    longer = [[*PROMPTS[3], *prompt, *PROMPTS[5]] for prompt in PROMPTS]
    for prompts in (PROMPTS, longer, longer[::-1]):
        for params in (GREEDY, SAMPLED):
            expected = [result(completion) for completion in eager.generate(prompts, params)]
            assert [result(completion) for completion in graphed.generate(prompts, params)] == expected
    graphs = graphed.core.model_runner.graphs
    assert graphs is not None
    kinds = {(bool(key.rows), key.prompts) for key in graphs.captured if key.prompts}
    assert {(True, 2), (True, 4)} <= kinds
    assert {key.tokens for key in graphs.captured} == {0, 64}
    assert log.count("capture") == len(graphs.captured)
    assert log.count("replay") > 200


def test_padding_of_prompts_touches_nothing_that_a_sequence_owns(folder: Path) -> None:
    eager, graphed = load(folder, max_num_batched_tokens=40), load(folder, max_num_batched_tokens=40)
    log = with_graphs(graphed, mixed=True)
    for llm in (eager, graphed):
        storage = llm.core.model_runner.storage
        for tensor in (storage.kv, storage.conv, storage.ssm):
            tensor.fill_(7.0)
        for prompts in (PROMPTS[:5], PROMPTS[5:16], PROMPTS):
            llm.generate(prompts, GREEDY)
    assert log.count("replay") > 10
    ours, theirs = graphed.core.model_runner.storage, eager.core.model_runner.storage
    for name in ("kv", "conv", "ssm"):
        assert torch.equal(getattr(ours, name)[1:], getattr(theirs, name)[1:])


def test_what_needs_all_hidden_states_runs_without_a_graph(folder: Path) -> None:
    eager, graphed = load(folder), load(folder)
    log = with_graphs(graphed, mixed=True)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    for _ in range(3):
        expected = [completion.prompt_logprobs for completion in eager.generate(PROMPTS[:3], params)]
        assert [completion.prompt_logprobs for completion in graphed.generate(PROMPTS[:3], params)] == expected
    assert log == []


def test_a_size_with_prompts_is_captured_when_it_comes_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SamplingParams(max_tokens=1, temperature=0.0)
    llm = load(folder, enable_prefix_caching=False)
    log = with_graphs(llm, mixed=True)
    lengths = [prompt[:20] for prompt in PROMPTS if len(prompt) >= 20]
    for prompt in lengths[:4]:
        llm.generate([prompt], one)
    assert log == ["capture", "replay", "replay"]
    graphs = llm.core.model_runner.graphs
    assert graphs is not None
    monkeypatch.setattr(graphs._sizes, "most_mixed", 1)  # pyright: ignore[reportPrivateUsage]
    for _ in range(3):
        llm.generate(lengths[:3], one)  # another size, and there are as many graphs as there may be
    assert log == ["capture", "replay", "replay"]


# Memory -----------------------------------------------------------------------------------------------------------


def test_short_memory_means_no_graph_and_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    eager, graphed = load(folder), load(folder)

    def free() -> int:
        """There is room for graphs of 10 rows in all."""
        graphs = graphed.core.model_runner.graphs
        taken = 0 if graphs is None else max((key.rows + key.tokens for key in graphs.captured), default=0)
        return BYTES_PER_GRAPH + (10 - taken) * 1000

    log = with_graphs(graphed, mixed=True, free_bytes=free, bytes_per_row=1000)
    for count in (8, 16, 9, 16):
        expected = [result(completion) for completion in eager.generate(PROMPTS[:count], GREEDY)]
        assert [result(completion) for completion in graphed.generate(PROMPTS[:count], GREEDY)] == expected
    graphs = graphed.core.model_runner.graphs
    assert graphs is not None
    assert {key.rows + key.tokens for key in graphs.captured} <= set(range(9))
    assert log.count("capture") == len(graphs.captured) > 0
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"and {free()} are free" in warning
    assert "gpu_memory_utilization" in warning


@pytest.mark.parametrize("ahead", [False, True])
def test_graphs_of_short_contexts_are_captured_before_the_first_request(folder: Path, ahead: bool) -> None:
    eager, graphed = load(folder), load(folder, async_scheduling=ahead)
    log = with_graphs(graphed)
    runner = graphed.core.model_runner
    storage = runner.storage
    for tensor in (storage.kv, storage.conv, storage.ssm):
        tensor.fill_(7.0)
    steps = DummySteps(max_num_batched_tokens=64, max_num_seqs=MAX_NUM_SEQS, max_model_len=512, block_size=16)
    reply = steps.reply()
    assert reply is not None
    assert runner.capture_graphs(reply) == 6
    assert log == ["capture"] * 6
    assert runner.graphs is not None
    assert runner.graphs.captured == {GraphKey(rows, 512) for rows in (1, 2, 4, 8, 16, 18)}
    for tensor in (storage.kv, storage.conv, storage.ssm):
        assert bool((tensor[1:] == 7).all())
    expected = [result(completion) for completion in eager.generate(PROMPTS, GREEDY)]
    assert [result(completion) for completion in graphed.generate(PROMPTS, GREEDY)] == expected
    assert log.count("capture") == 6


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
    assert {sizes.key(key.rows, key.context) for key in sizes.keys} == set(sizes.keys)


def test_all_graphs_together_take_a_small_part_of_a_gpu() -> None:
    # the 3B model's widest layer in float32
    assert 0 < GraphSizes(256, 262_144, "cuda").graph_bytes(4 * 40_960) < 1.25 * 1024**3
    assert GraphSizes(1, 2048, "cuda", mixed=False).graph_bytes(1000) == (4 + 64) * 1024**2 + 1000
    assert GraphSizes(1, 2048, "cuda").graph_bytes(1000) == (4 + 64 * 4 + 64) * 1024**2 + 1025 * 1000


def test_a_step_with_prompts_takes_the_smallest_graph_with_room_for_padding() -> None:
    sizes = GraphSizes(256, 262_144, "cuda")
    assert sizes.mixed_key(5, 100, 63, 1) == GraphKey(8, 2048, 64, 2)
    assert sizes.mixed_key(5, 100, 64, 1) == GraphKey(8, 2048, 128, 2)  # the padding prompt needs a token
    assert sizes.mixed_key(200, 9000, 100, 2) == GraphKey(256, 32_768, 128, 4)
    assert sizes.mixed_key(0, 100, 1023, 1) == GraphKey(0, 2048, 1024, 2)
    assert sizes.mixed_key(0, 100, 1024, 1) is None
    assert sizes.mixed_key(8, 100, 20, 16) is None
    assert sizes.mixed_key(257, 100, 20, 1) is None
    assert GraphSizes(4, 300, "cuda").mixed_key(3, 100, 250, 1) == GraphKey(4, 300, 256, 2)
    assert GraphSizes(4, 300, "cuda").mixed_key(3, 100, 256, 1) is None, "a padding prompt of 256 tokens does not fit"
    assert GraphSizes(256, 2048, "cuda", mixed=False).mixed_key(3, 100, 20, 1) is None


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
    with pytest.raises(RuntimeError, match=r"of 3 rows could not be captured \(operation not .*--enforce-eager"):
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
    for one, tensor in zip(arrays, tensors, strict=True):
        assert torch.equal(tensor, torch.from_numpy(one))
        assert (tensor.data_ptr() - packed.data_ptr()) % ALIGNMENT == 0
    for one, tensor in zip(arrays[3:], cut(packed, arrays[3:], packed_bytes(arrays[:3])), strict=True):
        assert torch.equal(tensor, torch.from_numpy(one))


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("sends_tables", [False, True])
def test_the_input_buffer_has_room_for_every_graph(block_size: int, sends_tables: bool) -> None:
    sizes = GraphSizes(70, 9000, "cuda")
    for key in sizes.keys:
        assert packed_bytes(inputs_of(key, block_size, sends_tables)) <= sizes.input_bytes(
            block_size, sends_tables=sends_tables
        )
    largest = sizes.mixed_key(70, 9000, 1000, 15)
    assert largest == GraphKey(70, 9000, 1024, 16)
    assert largest is not None
    room = sizes.input_bytes(block_size, sends_tables=sends_tables)
    assert packed_bytes(inputs_of(largest, block_size, sends_tables)) <= room


def inputs_of(key: GraphKey, block_size: int, sends_tables: bool) -> list[Any]:
    """Arrays of the sizes of a graph's inputs."""
    rows = np.zeros(key.rows + key.tokens, dtype=np.int64)
    arrays = [rows, rows, rows]
    for count in (key.rows, key.prompts):
        short = np.zeros(count, dtype=np.int32)
        width = -(-key.context // block_size)
        tables = np.zeros((count, width), dtype=np.int32) if sends_tables else np.zeros(count, dtype=np.int64)
        arrays += [short, tables, short]
    starts, saves = np.zeros(key.prompts + 1, dtype=np.int32), np.zeros(key.prompts * SAVES_PER_PROMPT, dtype=np.int32)
    return [*arrays, starts, starts, saves, saves, np.zeros(key.prompts, dtype=np.bool_)]


# Page tables ------------------------------------------------------------------------------------------------------


def test_page_tables_on_the_device_are_those_that_would_be_sent() -> None:
    """Sequences start, grow, wait, come back with other pages, and end."""
    random, width, block_size = Random(0), 20, 16
    tables = DeviceTables(5, width, torch.device("cpu"))
    running: list[Sequence] = []

    def pages(count: int) -> array[int]:
        return array("i", [random.randrange(1, 1000) for _ in range(count)])

    for number in range(300):
        for seq in running:
            match random.randrange(8):
                case 0:
                    seq.state_id, seq.block_ids = 0, array("i")
                case 1:
                    seq.block_ids = pages(random.randint(1, width))  # it has waited, and runs again
                case 2 | 3 if len(seq.block_ids) < width:
                    seq.block_ids.extend(pages(1))
                case _:
                    pass
        running = [seq for seq in running if seq.state_id]
        while len(running) < random.randint(1, 5):
            request = Request(id=str(number), prompt=[1], params=GREEDY)
            running.append(seq := Sequence.of(request, arrival=number, now=0.0))
            seq.block_ids, seq.state_id = pages(random.randint(1, width)), 7
        idle = Sequence.of(Request(id="dummy", prompt=[1], params=GREEDY), arrival=0, now=0.0)
        idle.block_ids = array("i", [0] * width)
        chosen = [*random.sample(running, random.randint(1, len(running))), idle]
        chunks = [Chunk(seq, 0, block_size * len(seq.block_ids), 1) for seq in chosen]
        tables.apply(*map(torch.from_numpy, tables.update(chunks)))
        rows = torch.from_numpy(tables.rows(chunks, len(chunks) + 2))
        expected = table_arrays(chunks, block_size, len(chunks) + 2, block_size * width).block_tables
        assert np.array_equal(tables.gather(rows, width).numpy(), expected)
        assert not tables.tables[0].any()


def test_a_step_sends_only_new_pages() -> None:
    tables = DeviceTables(2, 100, torch.device("cpu"))
    seq = Sequence.of(Request(id="", prompt=[1], params=GREEDY), arrival=0, now=0.0)
    seq.state_id, seq.block_ids = 1, array("i", range(10, 60))
    chunks = [Chunk(seq, 0, 1, 1)]
    assert len(tables.update(chunks).pages) == 50
    assert len(tables.update(chunks).pages) == 0
    seq.block_ids.append(99)
    changes = tables.update(chunks)
    assert (changes.places.tolist(), changes.pages.tolist()) == ([tables.rows(chunks, 1)[0] * 100 + 50], [99])
