"""Steps launched before the tokens of the last one are known: the same replies, bit for bit, whatever is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from jamba_server.engine.scheduler import SchedulerOutput
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.llm import LLM, Completion
from tests.engine.test_exact import CONFIG
from tests.nightly import each_pair

RANDOM = Random(11)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(1, 70))] for _ in range(9)]
PLAIN = SamplingParams(max_tokens=30, temperature=0.9, seed=4, ignore_eos=True, logprobs=3)
MASKS = {"allowed_token_ids": (3, 4, 5, 6), "bad_words": ((3,), (4, 4), (5, 4, 5), (6, 5, 6, 6))}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("async")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, load_format="dummy", max_model_len=256, threads=1, **{"max_num_seqs": 8} | settings)


def result(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.logprobs, completion.prompt_logprobs, completion.finish_reason


def finish(llm: LLM) -> None:
    """Reads the results of a step that may still be under way although all requests have ended."""
    while llm.core.has_work:
        assert llm.core.step().updates == []
    stats = llm.core.scheduler.stats
    assert (stats.kv_blocks_used, stats.state_slots_used) == (0, 0)


def count_ahead(llm: LLM) -> list[int]:
    """Returns a list to which each later step appends the number of its rows whose token the host did not know."""
    counts: list[int] = []
    launch = llm.core.model_runner.launch

    def counted(output: SchedulerOutput) -> Any:
        counts.append(sum(chunk.is_ahead for chunk in output.chunks))
        return launch(output)

    llm.core.model_runner.launch = counted
    return counts


def stopping(folder: Path, max_tokens: int = 30) -> SamplingParams:
    """PLAIN with stop tokens that end some replies early and others not at all."""
    params = msgspec.structs.replace(PLAIN, max_tokens=max_tokens)
    replies = [set(completion.token_ids) for completion in load(folder).generate(PROMPTS, params)]
    rare = [token for token in range(500) if sum(token in reply for reply in replies) == 1]
    return msgspec.structs.replace(params, stop_token_ids=tuple(rare[:4]))


ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    PENALTIES,
    MASKS,
    {"min_tokens": 20, "stop_token_ids": tuple(range(3, 500, 4))},
    {"max_tokens": 1},
    {"max_tokens": 0, "prompt_logprobs": 1},
    {"prompt_logprobs": 2, "logit_bias": {7: 3.0}},
]


@each_pair({"asked": ASKED, "settings": [{"max_num_batched_tokens": 11}, {}, {"enable_prefix_caching": False}]})
def test_equals_the_engine_that_waits(folder: Path, asked: dict[str, Any], settings: dict[str, Any]) -> None:
    params = msgspec.structs.replace(PLAIN, **asked)
    expected = [result(completion) for completion in load(folder).generate(PROMPTS, params)]
    llm = load(folder, async_scheduling=True, **settings)
    assert [result(completion) for completion in llm.generate(PROMPTS, params)] == expected
    finish(llm)


def test_a_token_after_the_last_is_dropped(folder: Path) -> None:
    params = stopping(folder)
    expected = load(folder).generate(PROMPTS, params)
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}
    llm = load(folder, async_scheduling=True)
    counts = count_ahead(llm)
    for _ in range(2):  # the second time from the cache, which the steps that were too many must not have spoilt
        assert list(map(result, llm.generate(PROMPTS, params))) == list(map(result, expected))
    assert sum(counts) > 0.8 * 2 * sum(len(completion.token_ids) - 1 for completion in expected)


def test_replies_that_were_preempted(folder: Path) -> None:
    page = 16 * 2 * 2 * 20 * 2  # one attention layer, K and V, two heads of 20, bfloat16
    params = stopping(folder, max_tokens=100)
    expected = load(folder).generate(PROMPTS, params)
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}
    llm = load(folder, async_scheduling=True, kv_cache_memory_bytes=18 * page, max_num_batched_tokens=64)
    assert list(map(result, llm.generate(PROMPTS, params))) == list(map(result, expected))
    assert llm.core.scheduler.stats.num_preemptions_total > 0


def test_a_conversation_that_goes_on_reads_the_cache(folder: Path) -> None:
    params = stopping(folder)
    [reply] = load(folder).generate(PROMPTS[3:4], params)
    longer = [*PROMPTS[3], *reply.token_ids, 8, 9]
    [expected] = load(folder).generate([longer], params)
    llm = load(folder, async_scheduling=True)
    llm.generate(PROMPTS[3:4], params)
    [warm] = llm.generate([longer], params)
    assert result(warm) == result(expected)
    assert warm.num_cached >= len(PROMPTS[3]) + len(reply.token_ids) - 1


@pytest.mark.parametrize("asked", [PENALTIES, MASKS], ids=["penalties", "masks"])
def test_what_looks_at_the_last_tokens_waits_for_them(folder: Path, asked: dict[str, Any]) -> None:
    llm = load(folder, async_scheduling=True)
    counts = count_ahead(llm)
    llm.generate(PROMPTS, msgspec.structs.replace(PLAIN, **asked))
    assert sum(counts) == 0


def test_forbidden_tokens_that_do_not_depend_on_the_reply_wait_for_nothing(folder: Path) -> None:
    llm = load(folder, async_scheduling=True)
    counts = count_ahead(llm)
    llm.generate(PROMPTS, msgspec.structs.replace(PLAIN, allowed_token_ids=(3, 4, 5), bad_words=((3,),)))
    assert sum(counts) > 0


def test_bad_words_and_allowed_tokens_alone_and_in_a_batch(folder: Path) -> None:
    params = msgspec.structs.replace(PLAIN, **MASKS, temperature=2.0)
    together = load(folder).generate(PROMPTS, params)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert result(load(folder).generate([prompt], params)[0]) == result(completion)
    texts = ["".join(map(str, completion.token_ids)) for completion in together]
    assert set("".join(texts)) == set("456")
    assert not [word for word in ("44", "545", "6566") if any(word in text for text in texts)]
    assert all(any(pair in text for text in texts) for pair in ("45", "54", "656", "66"))  # parts of them may occur


def test_an_abort_while_a_step_is_under_way(folder: Path) -> None:
    expected = load(folder).generate(PROMPTS[:3], PLAIN)
    llm = load(folder, async_scheduling=True)
    core = llm.core
    core.inbox.submit([Request(id=str(i), prompt=prompt, params=PLAIN) for i, prompt in enumerate(PROMPTS[:3])])
    updates: list[TokenUpdate] = []
    for _ in range(6):
        updates += core.step().updates
    core.inbox.abort(["1"])
    seen = sum(update.request_id == "1" for update in updates)
    while core.has_work:
        updates += core.step().updates
    assert sum(update.request_id == "1" for update in updates) == seen
    for i in (0, 2):
        tokens = [token for update in updates if update.request_id == str(i) for token in update.token_ids]
        assert tokens == expected[i].token_ids
    finish(llm)


@pytest.mark.parametrize("penalties", [{}, PENALTIES])
def test_nothing_is_said_of_a_request_that_was_aborted(folder: Path, penalties: dict[str, float]) -> None:
    """Not even the token of a step that was under way."""
    llm = load(folder, async_scheduling=True)
    params = msgspec.structs.replace(PLAIN, **penalties)
    llm.core.inbox.submit([Request(id="gone", prompt=PROMPTS[0], params=params)])
    for _ in range(4):
        llm.core.step()
    llm.core.inbox.abort(["gone"])
    finish(llm)
