"""The model in several processes: what one process answers, without a server and without an event loop."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.errors import ConfigError, RequestRejected
from jamba_server.engine.process.blocking import BlockingEngine
from jamba_server.llm import LLM, Completion
from tests.engine.parallel.test_parallel_processes import is_running

SIZES: dict[str, Any] = {
    "threads": 1,
    "max_num_seqs": 4,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 8 << 20,
    "state_cache_memory_bytes": 8 << 20,
}
PROMPTS = ["Once upon a time", "The dog", "There was a"]
SAMPLING: dict[str, Any] = {"max_tokens": 24, "seed": 3, "n": 2, "stop": [" was", "."], "logprobs": 2}


@pytest.fixture(scope="module")
def alone() -> LLM:
    return LLM(tensor_parallel_exact=True, **SIZES)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(tensor_parallel_size=2, **SIZES) as llm:
        yield llm


def engine_pid(llm: LLM) -> int:
    engine = llm._engine  # pyright: ignore[reportPrivateUsage]
    assert isinstance(engine, BlockingEngine)
    pid = engine._client.pid  # pyright: ignore[reportPrivateUsage]
    assert pid is not None
    return pid


def ranks(llm: LLM) -> list[int]:
    pid = engine_pid(llm)
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 300
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(completions: list[Completion]) -> list[Any]:
    return [(c.prompt, c.index, c.text, c.token_ids, c.logprobs, c.finish_reason, c.stop_reason) for c in completions]


def test_replies_are_those_of_one_process(llm: LLM, alone: LLM) -> None:
    assert (llm.info.tensor_parallel_size, len(ranks(llm))) == (2, 2)
    expected = alone.generate(PROMPTS, **SAMPLING)
    assert {reply.stop_reason for reply in expected} & {" was", "."}
    assert contents(llm.generate(PROMPTS, **SAMPLING)) == contents(expected)
    message = [{"role": "user", "content": "Tell me a story."}]
    assert contents(llm.chat(message, max_tokens=8, seed=1)) == contents(alone.chat(message, max_tokens=8, seed=1))
    assert [v.tolist() for v in llm.embed(PROMPTS)] == [v.tolist() for v in alone.embed(PROMPTS)]
    with pytest.raises(RequestRejected, match="temprature is not a sampling parameter"):
        llm.generate("a", temprature=1)
    with pytest.raises(ConfigError, match="the engine is not in this one"):
        _ = llm.core


def test_a_call_goes_on_when_a_process_is_killed(llm: LLM, alone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kills = ranks(llm), list[int]()
    run = BlockingEngine.run

    def killing(engine: BlockingEngine, requests: Any) -> Iterator[Any]:
        for number, update in enumerate(run(engine, requests)):
            if number == 10:
                kills.append(before[1])
                os.kill(before[1], signal.SIGKILL)
            yield update

    monkeypatch.setattr(BlockingEngine, "run", killing)
    sampling: dict[str, Any] = {**SAMPLING, "stop": [], "ignore_eos": True}
    assert contents(llm.generate(PROMPTS, **sampling)) == contents(alone.generate(PROMPTS, **sampling))
    assert kills
    until_ended(before)


def test_an_interrupt_leaves_no_work_for_the_next_call(llm: LLM, alone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jamba_server.llm._Reply.take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, max_tokens=400, ignore_eos=True)
    assert contents(llm.generate(PROMPTS, **SAMPLING)) == contents(alone.generate(PROMPTS, **SAMPLING))
    engine = llm._engine  # pyright: ignore[reportPrivateUsage]
    assert isinstance(engine, BlockingEngine)
    assert [*engine._client.live_requests()] == []  # pyright: ignore[reportPrivateUsage]


def test_a_start_that_fails_leaves_no_process() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3; it must be one of 1, 2, 4, 8"):
        LLM(tensor_parallel_size=3, **SIZES)


def test_processes_end_with_the_last_reference() -> None:
    llm = LLM(pipeline_parallel_size=2, **SIZES)
    pids = ranks(llm)
    assert len(pids) == 2
    del llm
    gc.collect()
    until_ended(pids)
