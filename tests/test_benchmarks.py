"""The numbers from which benchmarks compute limits, such as the bytes of weights that a decode step reads."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from random import Random

import pytest

from benchmarks.cache.policies import PARTS, ROWS, Row
from benchmarks.cache.replay import Costs, Replay, Simulated, StepWork, summarize
from benchmarks.cpu import saved_state_error as saved_state_error
from benchmarks.http.shapes import write_tokenizer
from benchmarks.shapes import SHAPES, Format, active_parameters, weights_read, write_config
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.cache.state_store import SlotStates
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.types import SamplingParams
from jamba_server.server.cli.bench.sessions import Session, Turn
from jamba_server.server.text.tokenizer import Tokenizer
from tests.engine.simulator import Simulator, make_scheduler, random_request


def shape(name: str, folder: Path) -> JambaConfig:
    write_config(name, folder)
    return load_model_config(folder)


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"tiny"}))
def test_with_every_expert_hit_a_step_reads_all_but_the_embedding(name: str, tmp_path: Path) -> None:
    config = shape(name, tmp_path)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    expected = 2 * (config.num_parameters() - embedding)
    assert weights_read(config, 10_000, Format.parse("bf16")) == pytest.approx(
        expected, rel=0.01
    )  # a few numbers are float32


def test_one_token_reads_the_experts_that_it_is_sent_to(tmp_path: Path) -> None:
    config = shape("moe", tmp_path)
    expert = 3 * config.hidden_size * config.intermediate_size
    missed = 4 * (16 - 2) * expert
    everything = weights_read(config, 10_000, Format.parse("bf16"))
    assert weights_read(config, 1, Format.parse("bf16")) == pytest.approx(everything - 2 * missed, rel=0.01)
    head = config.vocab_size * config.hidden_size
    assert active_parameters(config) == pytest.approx(everything / 2 - missed - head, rel=0.01)


def test_formats_store_what_they_say(tmp_path: Path) -> None:
    config = shape("3b", tmp_path)
    plain, int8, whole = (weights_read(config, 1, Format.parse(name)) for name in ("bf16", "int8", "int8+mamba"))
    mixers = 26 * 3 * 2560 * 5120
    assert int8 - whole == pytest.approx(mixers, rel=2e-3)  # a byte a number less, but for the scales
    assert plain - whole == pytest.approx(plain / 2, rel=2e-2)
    assert Format.parse("int4+mamba").settings == {"dtype": "bfloat16", "quantization": "int4", "quantize_mamba": True}
    with pytest.raises(SystemExit, match="bf16 or one of int8, int4"):
        Format.parse("bf16+mamba")


def test_the_tokenizer_of_a_shape_has_a_text_for_every_id(tmp_path: Path) -> None:
    write_config("small", tmp_path)
    write_tokenizer(1000, tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 1000


def test_a_forced_text_without_a_restore_is_scored_as_a_prompt_is() -> None:
    llm = saved_state_error.load("float32")
    [text] = saved_state_error.some_texts(llm, 1)
    runner, cuts = llm.core.model_runner, (100, 150)
    [scored] = llm.generate([text], SamplingParams(max_tokens=0, prompt_logprobs=1))
    if llm.core.info.batch_dependent_ops:
        pytest.skip("these kernels' results depend on how a prompt is cut")
    expected = [entry for entry in scored.prompt_logprobs[101:] if entry is not None]
    assert saved_state_error.forced(runner, text, cuts, saved_state_error.as_it_is) == expected
    for restore in (saved_state_error.through_int8, saved_state_error.through_bfloat16):
        found = saved_state_error.forced(runner, text, cuts, restore)
        rows = saved_state_error.summary(saved_state_error.compare(zip(range(1, 300), found, expected, strict=True)))
        assert len(found) == 299
        assert sum(row["tokens"] for row in rows) == 299
        assert all(0 < row["mean"] < 0.1 for row in rows)


def test_a_replay_counts_hits_and_waits() -> None:
    """Two turns of one chat and a request beside them, on a clock that only the costs move."""
    turns = (
        Turn(tuple(range(100, 140)), 3, system=20),
        Turn(tuple(range(40)), 1, parent=0, history=43, system=20, arrival=9.0),
        Turn(tuple(range(200, 240)), 1, system=20, arrival=9.5),
    )
    sessions = [Session(turns), Session((Turn(tuple(range(300, 340)), 1, arrival=100.0),), arrival=100.0)]
    scheduler = make_scheduler(block_size=4, max_num_batched_tokens=64)
    costs = Costs(step=1000.0, prompt_token=100.0, decode=10.0)
    found = Replay(sessions).run(Simulated(scheduler, costs, first_token=1 << 20))
    # The first prompt takes one step. The second one goes on after the reply, whose last token was not computed. The
    # third one comes while the second is computed, and shares no token with it.
    assert [(o.prompt_tokens, o.cached_tokens) for o in found] == [(40, 0), (83, 42), (40, 0), (40, 0)]
    assert [o.ttft for o in (found[0], found[1], found[3])] == pytest.approx([5.0, 5.1, 5.0])
    assert summarize(found).hit_rate == 42 / (40 + 83 + 40 + 40)


def test_the_costs_of_steps_are_found_again() -> None:
    costs = Costs(step=5.0, prompt_token=0.5, decode=3.0)
    works = [StepWork(prompt, decodes) for prompt in (0, 7, 100, 256) for decodes in (0, 1, 5)]
    fitted = Costs.fit([(work, costs.seconds(work)) for work in works])
    assert astuple(fitted) == pytest.approx(astuple(costs))


@pytest.mark.parametrize("row", [*ROWS, *PARTS], ids=lambda row: row.name)
def test_every_policy_of_the_trace_table_keeps_the_cache_whole(row: Row) -> None:
    random = Random(0)
    scheduler = make_scheduler(num_pages=40, num_slots=9, max_model_len=60, caching=row.enabled)
    scheduler.cache = CacheManager(
        SlotStates(9), num_pages=40, block_size=4, interval=64, enabled=row.enabled, policy=row.policy(8)
    )
    simulator, stems = Simulator(scheduler), [[random.randrange(5) for _ in range(50)] for _ in range(3)]
    scheduler.add([random_request(random, number, stems, 60) for number in range(40)], now=0.0)
    while scheduler.has_work:
        simulator.step(lambda _: random.randrange(5))
    assert (scheduler.stats.prefix_hits_total > 0) == row.enabled
    assert scheduler.stats.kv_blocks_used == 0
