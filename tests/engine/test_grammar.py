"""Replies under a grammar: they follow it, and they are the same bit for bit whatever happens around the request."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import EngineFailed
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.scheduler import SchedulerOutput
from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.llm import LLM, Completion
from tests.engine.test_exact import CONFIG
from tests.synthetic_tokenizer import FIRST_BYTE, build_tokenizer, write_tokenizer

EOS = (2, 519)
VOCAB = 1999
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "kind": {"enum": ["the hello", "the end", 7, None]},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
        "description": {"const": "all in the x B C"},
        "more": {"type": "boolean"},
    },
    "required": ["name", "kind", "tags", "description", "more"],
    "additionalProperties": False,
}
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
TOKENIZER = build_tokenizer("reasoning")
RANDOM = Random(17)
PROMPTS = [[RANDOM.randrange(3, 500) for _ in range(RANDOM.randint(1, 90))] for _ in range(32)]
SUBJECT = PROMPTS[0]
PLAIN = SamplingParams(max_tokens=90, temperature=1.0, seed=4, grammar=JSON)
SCORED = msgspec.structs.replace(PLAIN, logprobs=3)


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grammar")
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": VOCAB, "eos_token_id": list(EOS)}))
    write_tokenizer(path, "reasoning")
    return path


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, load_format="dummy", max_model_len=256, threads=1, **{"max_num_seqs": 8} | settings)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return load(folder)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Any]:
    """The results of the subject when it runs alone, with and without log-probabilities."""
    return [result(llm.generate([SUBJECT], params)[0]) for params in (SCORED, PLAIN)]


def result(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.logprobs, completion.finish_reason


def text_of(completion: Completion) -> str:
    """The text of a reply, without the token that ends it."""
    assert completion.token_ids[-1] in EOS
    return TOKENIZER.decode(completion.token_ids[:-1], skip_special_tokens=False)


def others() -> list[Request]:
    """Returns the parameters of 31 other requests: with other grammars, without a grammar, with penalties and masks."""
    kinds: list[dict[str, Any]] = [
        {"grammar": regex("(the |hello |[a-z]{1,3} ){4,30}")},
        {"grammar": ""},
        {"grammar": JSON, "temperature": 0.7, "top_k": 9, "logprobs": 1},
        {"grammar": "", "thinking_token_budget": 5, "thinking_end": (542,)},
        {"grammar": JSON, "frequency_penalty": 0.5, "top_p": 0.9},
        {"grammar": "", "bad_words": ((5,), (6, 7)), "repetition_penalty": 1.2},
    ]
    params = [msgspec.structs.replace(PLAIN, **kinds[n % len(kinds)], seed=n) for n in range(31)]
    return [Request(id=str(n), prompt=PROMPTS[n + 1], params=params[n]) for n in range(31)]


def run(llm: LLM, requests: list[Request]) -> dict[str, list[TokenUpdate]]:
    """Runs requests and returns all updates of each."""
    updates: dict[str, list[TokenUpdate]] = {request.id: [] for request in requests}
    llm.core.inbox.submit(requests)
    while not all(got and got[-1].finish_reason for got in updates.values()):
        if not llm.core.has_work:
            llm.core.inbox.wait()
        for update in llm.core.step().updates:
            updates[update.request_id].append(update)
    return updates


def gathered(updates: list[TokenUpdate]) -> tuple[Any, ...]:
    tokens = [token for update in updates for token in update.token_ids]
    return tokens, [entry for update in updates for entry in update.logprobs], updates[-1].finish_reason


# Exactness --------------------------------------------------------------------------------------------------------


def test_tokens_that_the_grammar_forces_are_the_same_one_by_one_and_in_a_chunk(llm: LLM, alone: list[Any]) -> None:
    """With log-probabilities each token is a step's. Without, the grammar's own tokens come in a chunk."""
    assert alone[0][0] == alone[1][0]
    assert alone[1][2] == "stop"
    assert len(alone[0][1]) == len(alone[0][0])
    [updates] = run(llm, [Request(id="r", prompt=SUBJECT, params=PLAIN)]).values()
    sizes = [len(update.token_ids) for update in updates]
    assert sum(sizes) == len(alone[0][0])
    assert max(sizes) > 20, "the constant text is one chunk"
    assert sizes[0] > 5, "the reply begins with forced tokens"


def test_log_probabilities_are_those_of_the_raw_distribution(llm: LLM, alone: list[Any]) -> None:
    """Equal to those of a prompt that has the reply in it, for which nothing was masked."""
    tokens, logprobs, _ = alone[0]
    [scored] = llm.generate([[*SUBJECT, *tokens]], SamplingParams(max_tokens=0, prompt_logprobs=3))
    assert scored.prompt_logprobs[len(SUBJECT) :] == logprobs
    assert any(entry.token_id not in dict(entry.top) for entry in logprobs), "the masks mattered"


@pytest.mark.parametrize("place", [0, 31])
def test_among_31_others(folder: Path, alone: list[Any], place: int) -> None:
    llm = load(folder, max_num_seqs=32)
    for params, expected in zip((SCORED, PLAIN), alone, strict=True):
        requests = others()
        requests.insert(place, Request(id="subject", prompt=SUBJECT, params=params))
        assert gathered(run(llm, requests)["subject"]) == expected


@pytest.mark.parametrize(("chunk", "ahead"), [(1, False), (5, False), (5, True), (64, True)])
def test_every_chunk_size(folder: Path, alone: list[Any], chunk: int, ahead: bool) -> None:
    llm = load(folder, max_num_batched_tokens=chunk, enable_prefix_caching=False, async_scheduling=ahead)
    assert [result(llm.generate([SUBJECT], params)[0]) for params in (SCORED, PLAIN)] == alone


def test_preempted(folder: Path) -> None:
    page = 16 * 1 * 2 * 2 * 20 * 2  # one attention layer, K and V, two heads of 20, bfloat16
    free = load(folder)
    for ahead in (False, True):
        llm = load(folder, kv_cache_memory_bytes=20 * page, max_num_batched_tokens=64, async_scheduling=ahead)
        for params in (SCORED, PLAIN):
            params = msgspec.structs.replace(params, grammar=regex("(the |hello |[a-z]{1,3} ){20,60}"), max_tokens=80)
            expected = [result(completion) for completion in free.generate(PROMPTS[:8], params)]
            before = llm.core.scheduler.stats.num_preemptions_total
            assert [result(completion) for completion in llm.generate(PROMPTS[:8], params)] == expected
            assert llm.core.scheduler.stats.num_preemptions_total > before


@pytest.mark.parametrize("params", [SCORED, PLAIN], ids=["one by one", "in chunks"])
def test_an_engine_that_is_restarted_goes_on(folder: Path, alone: list[Any], params: SamplingParams) -> None:
    """From every place at which an update may have ended, and from the middle of forced tokens, too."""
    tokens, logprobs, _ = alone[0]
    llm = load(folder, max_num_seqs=64)
    requests = [
        Request(id=str(n), prompt=SUBJECT, params=params, generated=tokens[:n]) for n in range(0, len(tokens), 2)
    ]
    for request_id, updates in run(llm, requests).items():
        got, entries, reason = gathered(updates)
        assert (got, reason) == (tokens[int(request_id) :], "stop")
        assert entries == (logprobs[int(request_id) :] if params is SCORED else [])


async def test_an_engine_process_that_is_killed(
    folder: Path, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jamba_server.engine.process.restarts.BACKOFF_SECONDS", 0.0)
    engine = EngineClient(EngineConfig(model=str(folder), load_format="dummy", max_model_len=256, threads=1))
    await engine.start()
    first, got = engine.pid, {"0": list[TokenUpdate](), "1": list[TokenUpdate]()}
    requests = [Request(id=str(n), prompt=SUBJECT, params=params) for n, params in enumerate((SCORED, PLAIN))]
    async with engine.generate(requests) as updates:
        async for update in updates:
            got[update.request_id].append(update)
            if len(got["0"]) == 8 and engine.pid == first:
                assert first is not None
                os.kill(first, signal.SIGKILL)
    assert engine.pid != first
    await engine.close()
    assert [gathered(updates) for updates in got.values()] == alone


def test_steps_ahead_give_the_same(folder: Path) -> None:
    sync, ahead = load(folder), load(folder, async_scheduling=True)
    counts: list[int] = []
    launch = ahead.core.model_runner.launch

    def counted(output: SchedulerOutput) -> Any:
        assert not any(c.is_ahead and c.sequence.params.grammar for c in output.chunks)
        counts.append(sum(chunk.is_ahead for chunk in output.chunks))
        return launch(output)

    ahead.core.model_runner.launch = counted
    mixed = others()[:16]
    free = [msgspec.structs.replace(mixed[3], id="thinks")]  # a budget alone makes only the steps at its end wait
    for requests in (mixed, free):
        assert {i: gathered(u) for i, u in run(ahead, requests).items()} == {
            i: gathered(u) for i, u in run(sync, requests).items()
        }
    assert sum(counts) > 0


def test_several_replies_to_one_prompt(llm: LLM) -> None:
    replies = llm.generate([SUBJECT], PLAIN, n=5)
    assert len({tuple(reply.token_ids) for reply in replies}) == 5
    for reply in replies:
        jsonschema.validate(json.loads(text_of(reply)), SCHEMA)


# The grammar is followed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.0, "logit_bias": {FIRST_BYTE + ord("a"): 50.0}},
        {"top_k": 3, "top_p": 0.5},
        {"min_p": 0.2, "temperature": 2.0},
        {"repetition_penalty": 1.5, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"bad_words": (*((token,) for token in ids("zqjwv")), tuple(ids("74")), tuple(ids("-9")))},
    ],
    ids=str,
)
def test_every_reply_is_valid(llm: LLM, asked: dict[str, Any]) -> None:
    params = msgspec.structs.replace(PLAIN, **asked, max_tokens=150)
    for reply in llm.generate(PROMPTS[:8], params):
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(text_of(reply)), SCHEMA)
        for word in params.bad_words:
            assert not any(tuple(reply.token_ids[i : i + len(word)]) == word for i in range(len(reply.token_ids)))


@pytest.mark.parametrize(
    ("asked", "least"),
    [({}, 0), ({"min_tokens": 30}, 30), ({"ignore_eos": True}, 60), ({"min_tokens": 65, "max_tokens": 80}, 60)],
    ids=str,
)
def test_an_end_is_put_off_only_as_long_as_the_grammar_goes_on(llm: LLM, asked: dict[str, Any], least: int) -> None:
    params = msgspec.structs.replace(PLAIN, grammar=regex("[a-y]{0,60}"), **asked)
    replies = llm.generate(PROMPTS[:6], params)
    assert all(reply.finish_reason == "stop" and reply.token_ids[-1] in EOS for reply in replies)
    assert all(re.fullmatch("[a-y]{0,60}", text_of(reply)) for reply in replies)
    assert all(least <= len(text_of(reply)) for reply in replies) or any("hello" in text_of(r) for r in replies)
    assert min(len(reply.token_ids) for reply in replies) > least / 5


def test_max_tokens_and_stop_tokens_within_forced_tokens(llm: LLM) -> None:
    whole = ids("the hello x BC in the end")
    for params in (PLAIN, SCORED):
        params = msgspec.structs.replace(params, grammar=regex("the hello x BC in the end"))
        [full] = llm.generate([SUBJECT], params)
        assert full.token_ids[:-1] == whole
        for count in range(1, len(whole) + 1):
            [cut] = llm.generate([SUBJECT], msgspec.structs.replace(params, max_tokens=count))
            assert (cut.token_ids, cut.finish_reason) == (whole[:count], "length")
        stop = whole[3]
        [stopped] = llm.generate([SUBJECT], msgspec.structs.replace(params, stop_token_ids=(stop,)))
        assert (stopped.token_ids, stopped.finish_reason) == (whole[: whole.index(stop) + 1], "stop")


def test_what_forbids_all_that_the_grammar_allows_ends_the_request(llm: LLM) -> None:
    params = msgspec.structs.replace(PLAIN, grammar=regex("xa[bc]"), allowed_token_ids=(*ids("xade"), *EOS))
    with pytest.raises(EngineFailed, match="forbid every token that the grammar allows"):
        llm.generate([SUBJECT], params)
    [reply] = llm.generate([SUBJECT], msgspec.structs.replace(params, allowed_token_ids=tuple(ids("xab"))))
    assert text_of(reply) == "xab"
    assert llm.core.scheduler.stats.state_slots_used == 0


# A budget of thinking tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [(542,), (542, 700, 542, 701)])
@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_thoughts_end_after_their_budget(folder: Path, budget: int, end: tuple[int, ...], logprobs: int | None) -> None:
    asked = {"grammar": "", "thinking_token_budget": budget, "thinking_end": end, "max_tokens": 20}
    params = msgspec.structs.replace(PLAIN, **asked, logprobs=logprobs)
    free = msgspec.structs.replace(params, thinking_token_budget=None)
    for ahead in (False, True):
        llm = load(folder, async_scheduling=ahead)
        [reply], [unbound] = llm.generate([SUBJECT], params), llm.generate([SUBJECT], free)
        assert reply.token_ids[:budget] == unbound.token_ids[:budget]
        assert tuple(reply.token_ids[budget : budget + len(end)]) == end
        assert len(reply.token_ids) == 20
        assert len(reply.logprobs) == (0 if logprobs is None else 20)
        requests = [Request(id=str(n), prompt=SUBJECT, params=params, generated=reply.token_ids[:n]) for n in range(14)]
        assert all(gathered(updates)[0] == reply.token_ids[int(n) :] for n, updates in run(llm, requests).items()), (
            "a restarted engine goes on"
        )


def test_thoughts_that_ended_by_themselves_are_left_alone(llm: LLM) -> None:
    """The model has begun the mark when the budget is used up: only the rest of the mark is forced."""
    params = msgspec.structs.replace(PLAIN, grammar="", max_tokens=12)
    [free] = llm.generate([SUBJECT], params)
    end = tuple(free.token_ids[4:7])
    ended = msgspec.structs.replace(params, thinking_token_budget=9, thinking_end=end)
    assert llm.generate([SUBJECT], ended)[0].token_ids == free.token_ids
    begun = msgspec.structs.replace(ended, thinking_token_budget=6)
    assert llm.generate([SUBJECT], begun)[0].token_ids == free.token_ids
    other = msgspec.structs.replace(begun, thinking_end=(*end[:2], 9, 10))
    assert llm.generate([SUBJECT], other)[0].token_ids[:8] == [*free.token_ids[:6], 9, 10]


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_budget_within_a_grammar(llm: LLM, logprobs: int | None) -> None:
    grammar = LLMatcher.grammar_from_lark('start: /[a-z ]+/ </think> "the end " /[0-9]{3}/')
    asked = {"thinking_token_budget": 10, "thinking_end": (542,), "logprobs": logprobs}
    [reply] = llm.generate([SUBJECT], msgspec.structs.replace(PLAIN, grammar=grammar, **asked))
    text = text_of(reply)
    assert re.fullmatch(r"[a-z ]+</think>the end \d{3}", text)
    assert reply.token_ids.index(542) <= 10
    # where the grammar has no place for the mark, the budget does nothing
    [json_reply] = llm.generate([SUBJECT], msgspec.structs.replace(PLAIN, **asked))
    assert json_reply.token_ids == llm.generate([SUBJECT], PLAIN)[0].token_ids


class Panic(BaseException):
    """Stands for a panic of llguidance, which Python sees as an exception that is no subclass of Exception."""


class Broken:
    """A matcher that panics whenever it is used."""

    def __getattr__(self, name: str) -> Any:
        raise Panic(name)


@pytest.mark.parametrize("when", ["mask", "token"])
def test_a_matcher_that_panics_ends_its_own_request_only(
    folder: Path, alone: list[Any], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = load(folder).core
    core.inbox.submit([Request(id=id_, prompt=SUBJECT, params=PLAIN) for id_ in ("right", "broken")])
    updates: list[TokenUpdate] = []
    while len(core.scheduler.running) < 2 or len(core.scheduler.running[1].tokens) < len(SUBJECT) + 3:
        if not core.has_work:
            core.inbox.wait()
        updates += core.step().updates
    broken = core.scheduler.running[1].constraint
    assert broken is not None
    if when == "mask":
        broken.matcher = Broken()  # pyright: ignore[reportAttributeAccessIssue]
        broken.forced = ()
    else:
        filler = core.model_runner.masks
        complete = filler._complete  # pyright: ignore[reportPrivateUsage]

        def complete_and_break(mask: Any, row: Any, constraint: Constraint) -> None:
            complete(mask, row, constraint)
            if constraint is broken:
                constraint.matcher = Broken()  # pyright: ignore[reportAttributeAccessIssue]

        filler._complete = complete_and_break  # pyright: ignore[reportPrivateUsage]
    while core.has_work:
        updates += core.step().updates
    own = [update for update in updates if update.request_id == "broken"]
    assert own[-1].finish_reason == "error"
    assert "Panic" in (own[-1].error or "")
    assert gathered([update for update in updates if update.request_id == "right"]) == alone[1]
    assert "the grammar of a request failed" in caplog.text
