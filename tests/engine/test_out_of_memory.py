"""Steps that run out of a GPU's memory: what can be repeated is repeated once, and everything else fails as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from jamba_server.engine.out_of_memory import first_attempt
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, result
from tests.engine.test_graphs import with_graphs

RANDOM = Random(5)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(40)] for _ in range(4)]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[], LLM]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    return lambda: LLM(tmp_path, load_format="dummy", threads=1, max_num_seqs=4, enforce_eager=True)


def failing(work: Callable[..., Any], when: Callable[..., bool], times: int) -> Callable[..., Any]:
    """Does the work, and then reports that the memory is short, in the first `times` calls for which `when` says so."""
    left = [times]

    def run(*args: Any) -> Any:
        done = work(*args)
        if left[0] and when(*args):
            left[0] -= 1
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        return done

    return run


def test_a_step_of_new_prompts_is_tried_again(load: Callable[[], LLM], caplog: pytest.LogCaptureFixture) -> None:
    """The first attempt has written everything already, and the second one gives the same."""
    plain, llm = load(), load()
    with_graphs(llm)
    model: Any = llm.core.model_runner.model
    model.forward = failing(model.forward, lambda batch, storage: True, 1)
    expected = [result(completion) for completion in plain.generate(PROMPTS, GREEDY)]
    assert [result(completion) for completion in llm.generate(PROMPTS, GREEDY)] == expected
    assert "is tried once more: tried to allocate 3 GiB" in caplog.text


def test_a_step_that_has_moved_states_on_is_not_tried_again(load: Callable[[], LLM]) -> None:
    plain, llm = load(), load()
    with_graphs(llm)
    model: Any = llm.core.model_runner.model
    model.forward = failing(model.forward, lambda batch, storage: batch.decodes is not None, 1)
    with pytest.raises(torch.OutOfMemoryError):
        llm.generate(PROMPTS, GREEDY)
    expected = [result(completion) for completion in plain.generate(PROMPTS, GREEDY)]
    assert [result(completion) for completion in llm.generate(PROMPTS, GREEDY)] == expected, "tables start anew"


def test_sampling_is_tried_again(load: Callable[[], LLM]) -> None:
    plain, llm = load(), load()
    sampler: Any = llm.core.model_runner.sampler
    sampler._adjust = failing(sampler._adjust, lambda logits, rows, masks: len(rows) == 4, 1)
    expected = [result(completion) for completion in plain.generate(PROMPTS, GREEDY)]
    assert [result(completion) for completion in llm.generate(PROMPTS, GREEDY)] == expected


def test_the_second_error_is_raised() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("short")

    def attempts(*, is_last: bool) -> None:
        with first_attempt("work", is_last=is_last):
            return work()
        return work()

    for is_last, number in ((False, 2), (True, 1)):
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            attempts(is_last=is_last)
        assert len(calls) == number
    with pytest.raises(ValueError, match="other"), first_attempt("work"):
        raise ValueError("other")
