"""Grammars are compiled beside the steps: nobody waits for them, and none of them can do harm."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from jamba_server.engine.core import Inbox
from jamba_server.engine.errors import EngineFailed
from jamba_server.engine.grammar import compiler as module
from jamba_server.engine.grammar.compiler import Done, GrammarCompiler, GrammarError, compile_grammar, load_tokenizer
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.grammar.deep_thread import start_deep_thread
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG
from tests.engine.test_grammar import EOS, JSON, PLAIN, PROMPTS, VOCAB, folder, gathered, load, regex, result, run

__all__ = ["folder"]


class Held(GrammarCompiler):
    """A compiler that does its work when the test says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, VOCAB, EOS)
        self.held: list[tuple[Request, Done, Callable[[], bool]]] = []

    def start(self, request: Request, done: Done, is_wanted: Callable[[], bool] = lambda: True) -> None:
        self.held.append((request, done, is_wanted))

    def release(self) -> None:
        for request, done, is_wanted in self.held:
            super().start(request, done, is_wanted)


def test_a_grammar_that_is_compiled_holds_up_nobody(folder: Path) -> None:
    llm, free = load(folder), msgspec.structs.replace(PLAIN, grammar="", max_tokens=9)
    [expected], [constrained] = llm.generate(PROMPTS[1:2], free), llm.generate(PROMPTS[:1], PLAIN)
    compiler = Held(folder)
    llm.core.inbox = Inbox(compiler)
    llm.core.inbox.submit([Request(id="waits", prompt=PROMPTS[0], params=PLAIN)])
    others = run(llm, [Request(id="runs", prompt=PROMPTS[1], params=free)])
    assert gathered(others["runs"]) == result(expected)
    assert not llm.core.has_work
    compiler.release()
    llm.core.inbox.wait()
    updates = [update for _ in range(200) for update in llm.core.step().updates]
    assert gathered(updates) == result(constrained)


def test_an_abort_while_a_grammar_is_compiled(folder: Path) -> None:
    compiler = Held(folder)
    inbox = Inbox(compiler)
    first, second = (Request(id="r", prompt=[5], params=msgspec.structs.replace(PLAIN, seed=n)) for n in range(2))
    inbox.submit([first])
    inbox.abort(["r"])
    assert inbox.aborted() == [], "the scheduler has not heard of it"
    inbox.submit([second])  # the same id again
    compiler.release()
    inbox.wait()
    [submitted] = inbox.submitted()
    assert submitted.request is second
    assert inbox.submitted() == inbox.failed() == []


WRONG = {
    "syntax": "start: (",
    "regex": regex("[a-"),
    "json": '{"grammars":[{"json_schema":{"type":"strin"}}]}',
    "text": "nothing",
    "deep JSON": '{"grammars":[{"json_schema":' + '{"items":' * 5000 + "{}" + "}" * 5000 + "}]}",
    "deep parentheses": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "deep expression": regex("(" * 50_000 + "a" + ")" * 50_000),
    "not an object with grammars": '{"grammars": [[]]}',
    "a text without an end": 'start: a\na: "x" a',
    "a chain with an error": "start: r0" + "".join(f"\nr{i}: r{i + 1}" for i in range(99)) + "\nr99: /[a-/",
    "too many symbols": "start: " + " ".join('"a"?' for _ in range(60_000)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_grammar_ends_its_request_only(folder: Path, kind: str) -> None:
    llm = load(folder)
    grammar = WRONG[kind][:MAX_GRAMMAR_CHARS]
    requests = [
        Request(id="wrong", prompt=PROMPTS[0], params=msgspec.structs.replace(PLAIN, grammar=grammar)),
        Request(id="right", prompt=PROMPTS[1], params=PLAIN),
    ]
    updates = run(llm, requests)
    [failure] = updates["wrong"]
    assert failure.finish_reason == "error"
    assert failure.error is not None
    assert re.match("The grammar (cannot be compiled|of this reply failed): ", failure.error)
    assert len(failure.error) < 600
    assert updates["right"][-1].finish_reason == "stop"


def chain(count: int) -> str:
    """A schema of references, of which llguidance follows each by a call within a call."""
    links = {f"{i:x}": {"items": {"$ref": f"#/$defs/{i + 1:x}"}, "type": "array"} for i in range(count)}
    schema = {"$defs": links | {f"{count:x}": {"const": 1}}, "$ref": "#/$defs/0"}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


def test_the_longest_chain_of_references_does_not_overflow_the_stack(folder: Path) -> None:
    """It would end the process."""
    longest = next(count for count in range(12_000, 0, -500) if len(chain(count)) <= MAX_GRAMMAR_CHARS)
    assert longest > 5000
    params = msgspec.structs.replace(PLAIN, grammar=chain(longest), max_tokens=4)
    [reply] = load(folder).generate(PROMPTS[:1], params)
    assert reply.finish_reason in {"stop", "length"}


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    llm = load(tmp_path)
    with pytest.raises(EngineFailed, match=r"cannot follow grammars, because it has no tokenizer\.json\."):
        llm.generate([[5]], PLAIN)
    assert len(llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_tokenizer_with_more_tokens_than_the_model_says_so(folder: Path) -> None:
    with pytest.raises(GrammarError, match="vocab size too small; 500 vs 1905"):
        load_tokenizer(folder, 500, (2,))


def in_deep_thread(run: Any) -> None:
    thread = start_deep_thread(run)
    thread.join(60)
    assert not thread.is_alive()


def test_threads_that_start_later_have_the_usual_stack() -> None:
    before = threading.stack_size()
    in_deep_thread(lambda: None)
    assert threading.stack_size() == before


def test_each_grammar_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def counted(tokenizer: Any, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr(module, "compile_grammar", counted)
    monkeypatch.setattr(module, "MAX_CACHED_CHARS", 3 * len(JSON))
    compiler, results = GrammarCompiler(folder, VOCAB, EOS), list[Constraint | GrammarError]()
    padded = [JSON.replace('"name"', f'"name{n}"') for n in range(3)]
    for grammar in (padded[0], padded[0], padded[1], padded[0], padded[2], padded[0], padded[1]):
        done = threading.Event()

        def take(result: Constraint | GrammarError, done: threading.Event = done) -> None:
            results.append(result)
            done.set()

        compiler.start(Request(id="r", prompt=[5], params=msgspec.structs.replace(PLAIN, grammar=grammar)), take)
        assert done.wait(60)
    assert compiled == [padded[0], padded[1], padded[2], padded[1]], "the least recently used one is forgotten"
    matchers = {id(result.matcher) for result in results if isinstance(result, Constraint)}
    assert len(matchers) == 7, "each sequence has its own"


def test_a_reply_that_does_not_follow_its_grammar_cannot_be_continued(folder: Path) -> None:
    llm = load(folder)
    [updates] = run(llm, [Request(id="r", prompt=[5], params=PLAIN, generated=[7, 8])]).values()
    assert updates[0].finish_reason == "error"
    assert (updates[0].error or "").startswith("The grammar of this reply failed: ")


def test_a_step_that_fails_leaves_constrained_requests_that_have_not_begun(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm: LLM = load(folder, max_num_seqs=1)
    expected = [result(llm.generate([prompt], PLAIN)[0]) for prompt in PROMPTS[:2]]
    inbox = llm.core.inbox
    inbox.submit([Request(id=str(n), prompt=PROMPTS[n], params=PLAIN) for n in range(2)])
    while len(llm.core.scheduler.waiting) + len(llm.core.scheduler.running) < 2:
        llm.core.step()
    [waiting] = llm.core.scheduler.waiting
    with monkeypatch.context() as patch:
        patch.setattr(llm.core.model_runner.sampler, "kernels", msgspec.UNSET)
        with pytest.raises(AttributeError):
            llm.core.step()
    updates = [update for _ in range(200) for update in llm.core.step().updates]
    assert {update.request_id for update in updates} == {waiting.request.id}
    assert gathered(updates) == expected[int(waiting.request.id)]


class Panic(BaseException):
    """Stands for a panic of llguidance, which Python sees as an exception that is no subclass of Exception."""


def test_a_panic_ends_one_request_and_the_next_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(tokenizer: Any, grammar: str) -> LLMatcher:
        if grammar == regex("a"):
            raise Panic
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr(module, "compile_grammar", panic)
    updates = run(load(folder), [
        Request(id="panics", prompt=PROMPTS[0], params=msgspec.structs.replace(PLAIN, grammar=regex("a"))),
        Request(id="right", prompt=PROMPTS[1], params=PLAIN),
    ])  # fmt: skip
    assert "Panic" in (updates["panics"][0].error or "")
    assert updates["right"][-1].finish_reason == "stop"


def test_a_panic_over_the_tokenizer_ends_requests_with_grammars(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*arguments: Any) -> None:
        raise Panic

    monkeypatch.setattr(module, "load_tokenizer", panic)
    with pytest.raises(EngineFailed, match="cannot follow grammars: Panic"):
        load(folder).generate([[5]], PLAIN)


def test_tenants_take_turns_and_a_known_slow_grammar_comes_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, may_go, all_done = list[str](), threading.Event(), threading.Semaphore(0)
    compiled: list[str] = []

    def held(tokenizer: Any, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        assert may_go.wait(60)
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr(module, "compile_grammar", held)
    monkeypatch.setattr(module, "SLOW_SECONDS", -1.0)  # every compilation takes long
    monkeypatch.setattr(module, "MAX_CACHED_CHARS", 0)  # nothing stays in the cache
    compiler = GrammarCompiler(folder, VOCAB, EOS)

    def start(tenant: str, text: str, *, wanted: bool = True) -> None:
        def done(result: Constraint | GrammarError) -> None:
            order.append(f"{tenant} {text}")
            all_done.release()

        params = msgspec.structs.replace(PLAIN, grammar=regex(text))
        compiler.start(Request(id="r", prompt=[5], params=params, tenant=tenant), done, lambda: wanted)

    start("flood", "s")
    may_go.set()
    assert all_done.acquire(timeout=60)
    may_go.clear()
    start("flood", "first")
    for text in ("s", "a", "b", "c"):
        start("flood", text)
    start("honest", "x")
    start("left", "y", wanted=False)
    start("honest", "z")
    may_go.set()
    for _ in range(7):
        assert all_done.acquire(timeout=60)
    honest = [place for place, name in enumerate(order) if name.startswith("honest")]
    assert order[-1] == "flood s" and honest[0] <= 3 and honest[1] <= 5, order
    assert regex("y") not in compiled
