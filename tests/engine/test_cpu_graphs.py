"""The recorded steps of a CPU. The results must equal those of an engine without them, bit for bit."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from jamba_server.engine.cache.graph_sizes import GraphKey, GraphSizes
from jamba_server.engine.graphs import why_no_graphs
from jamba_server.engine.staging import packed_bytes
from jamba_server.engine.types import SamplingParams
from tests.engine.test_exact import CONFIG, FORMATS, result
from tests.engine.test_graphs import GREEDY, PROMPTS, RANDOM, SAMPLED, folder, inputs_of, load
from tests.nightly import each_pair

__all__ = ["folder"]


@each_pair({"form": FORMATS, "tied": (True, False)})
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


@each_pair({"form": FORMATS, "mixed": (8, 40)})
def test_replays_of_the_cpus_steps_with_prompts_equal_eager_steps(
    folder: Path, form: str, mixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of long prompts run alone and beside replies, states are saved within chunks, and prefixes come from the
    cache."""
    settings = FORMATS[form] | {"max_num_batched_tokens": 40, "max_num_mixed_tokens": mixed, "max_num_seqs": 6}
    eager, graphed = load(folder, **settings), load(folder, **settings, enforce_eager=False)
    graphs = graphed.core.model_runner.graphs
    if graphs is None:
        pytest.skip(f"no graphs on this machine: {why_no_graphs(graphed.core.info.kernels, 'cpu')}")
    captures, replays = Counter[bool](), Counter[bool]()
    forward = graphs.forward

    def counted(key: GraphKey, *rest: Any) -> Tensor:
        (replays if key in graphs.captured else captures)[bool(key.prompts)] += 1
        return forward(key, *rest)

    monkeypatch.setattr(graphs, "forward", counted)
    longer = [[*PROMPTS[3], *prompt, *PROMPTS[5]] for prompt in PROMPTS]
    long = [token for prompt in longer for token in prompt][:400]
    for prompts in ([long], PROMPTS, longer, longer[::-1]):
        for params in (GREEDY, SAMPLED):
            expected = [result(completion) for completion in eager.generate(prompts, params)]
            assert [result(completion) for completion in graphed.generate(prompts, params)] == expected
    assert captures[True] > 10 and replays[True] > 20
    assert {(key.rows, key.prompts > 1) for key in graphs.captured if key.prompts} == {(0, False), (0, True)}


def test_on_a_cpu_the_oldest_graph_of_a_step_with_prompts_makes_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(folder, enable_prefix_caching=False, enforce_eager=False)
    graphs = llm.core.model_runner.graphs
    if graphs is None:
        pytest.skip(f"no graphs on this machine: {why_no_graphs(llm.core.info.kernels, 'cpu')}")
    monkeypatch.setattr(graphs._sizes, "most_mixed", 2)  # pyright: ignore[reportPrivateUsage]

    def sizes_after(*lengths: int) -> set[int]:
        for length in lengths:
            llm.generate([PROMPTS[0][:1] * length], SamplingParams(max_tokens=1, temperature=0.0))
        return {key.tokens for key in graphs.captured}

    assert sizes_after(20) == set()
    assert sizes_after(20, 21, 21) == {20, 21}
    assert sizes_after(20, 22, 22) == {20, 22}


def test_on_a_cpu_there_is_a_graph_for_any_number_of_rows() -> None:
    sizes = GraphSizes(64, 262_144, "cpu")
    assert [sizes.key(rows, 512) for rows in (1, 13, 64)] == [GraphKey(rows, 512) for rows in (1, 13, 64)]
    assert sizes.key(3, 513) == GraphKey(3, 1024)
    assert sizes.key(64, 16_384) == GraphKey(64, 16_384)
    assert sizes.key(64, 16_385) is None


def test_on_a_cpu_the_graph_of_a_step_with_prompts_has_no_padding() -> None:
    sizes = GraphSizes(64, 262_144, "cpu")
    assert sizes.mixed_key(3, 100, 20, 2) == GraphKey(0, 512, 23, 5)
    assert sizes.mixed_key(0, 2048, 512, 1) == GraphKey(0, 2048, 512, 1)
    assert sizes.mixed_key(0, 2049, 512, 1) is None
    assert sizes.mixed_key(1, 100, 512, 1) is None
    assert GraphSizes(64, 2048, "cpu", mixed=False).mixed_key(3, 100, 20, 1) is None


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_the_input_buffer_has_room_for_every_graph_of_a_cpu(block_size: int) -> None:
    sizes = GraphSizes(64, 9000, "cpu")
    for rows, context, prompts in ((63, 2048, 1), (0, 2048, 64), (0, 9000, 1), (63, 8192, 1), (1, 2048, 511)):
        most = min(512, 1024**2 // sizes.contexts[bisect_left(sizes.contexts, context)])
        key = sizes.mixed_key(rows, context, most - rows, min(prompts, most - rows))
        assert key is not None
        assert packed_bytes(inputs_of(key, block_size, sends_tables=True)) <= sizes.input_bytes(block_size)
