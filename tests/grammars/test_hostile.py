"""Schemas and grammars that are made to harm: each is an error within a bounded time, and the next one is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.grammar.limits import MAX_SCHEMA_NODES
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS
from jamba_server.server.text.grammars.builder import GrammarBuilder
from jamba_server.server.text.grammars.checker import Setup, Verdict
from jamba_server.server.text.grammars.checker_process import CheckerProcess
from jamba_server.server.text.grammars.compile_check import Allowance, CompileCheck, Outcome, OverAllowance
from jamba_server.server.text.grammars.types import FormatKind, OutputFormat, ToolGrammar
from tests.synthetic_tokenizer import build_tokenizer, special_ids
from tools.schema_suite import Function

IM_END = special_ids("reasoning")["<|im_end|>"]


@pytest.fixture(scope="module")
def builder() -> Iterator[GrammarBuilder]:
    made = GrammarBuilder(CompileCheck(build_tokenizer("reasoning").to_str, eos_token_id=IM_END), {})
    yield made
    made.close()


def refusal(builder: GrammarBuilder, kind: FormatKind, value: Any) -> str:
    with pytest.raises(RequestRejected) as caught:
        builder.build(OutputFormat(kind=kind, value=value, param="here"))
    assert caught.value.param == "here"
    assert len(str(caught.value)) < 1000
    assert builder.build(OutputFormat(kind="choice", value=("a",)))  # the process of the checks works, or works again
    return str(caught.value)


def nested(keyword: str, depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {keyword: schema}
    return schema


def referring(ends: dict[str, Any]) -> dict[str, Any]:
    return {"$ref": "#/$defs/a", "$defs": ends}


ENDLESS: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/a"}},
    "required": ["n"],
    "additionalProperties": False,
}
DEEP_RULES = "start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(5000)) + 'r5000: "a"\n'

SCHEMAS: dict[str, tuple[Any, str]] = {
    "deep": (nested("items", 200_000), "nested more than"),
    "deep properties": ({"properties": {"a": nested("not", 200)}}, "nested more than"),
    "huge enum": ({"enum": [str(number) for number in range(MAX_SCHEMA_NODES)]}, "JSON values"),
    "long enum": ({"enum": ["x" * MAX_GRAMMAR_CHARS]}, "characters; the limit is"),
    "multiple of a large prime": ({"type": "integer", "multipleOf": 999_983}, "CPU time"),
    "long pattern": ({"pattern": "a" * 10_000}, "10000 characters"),
    "a reference to itself": ({"$ref": "#"}, "no value"),
    "references in a circle": (referring({"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}), "no value"),
    "a reference to itself beside a keyword": (
        referring({"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}),
        "$ref",
    ),
    "a value without an end": (referring({"a": ENDLESS}), "Too many items"),
    "an explosion of alternatives": (
        {"allOf": [{"anyOf": [{"properties": {f"p{n}_{k}": {"const": k}}} for k in range(3)]} for n in range(12)]},
        "schema too large",
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_refused(builder: GrammarBuilder, name: str) -> None:
    schema, why = SCHEMAS[name]
    assert why in refusal(builder, "json_schema", schema)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("regex", "(abc|def)?" * 20_000, "CPU time"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "refused"),
        ("regex", "a" * (MAX_GRAMMAR_CHARS + 1), "characters; the limit is"),
        ("lark", DEEP_RULES, "nested too deeply"),
        ("lark", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "refused"),
        ("lark", "start: start", "refused"),
        ("lark", "start: a", "refused"),
        ("lark", "start: %json " + json.dumps(nested("items", 400)), "refused"),
    ],
)
def test_a_regular_expression_or_grammar_is_refused(
    builder: GrammarBuilder, kind: FormatKind, value: str, why: str
) -> None:
    assert why in refusal(builder, kind, value)


def test_tools_are_refused_after_one_that_takes_too_long(builder: GrammarBuilder) -> None:
    slow = [
        Function(name=f"f{n}", parameters={"properties": {"a": {"type": "integer", "multipleOf": 999_983 - n}}})
        for n in range(50)
    ]
    with pytest.raises(RequestRejected, match="CPU time"):
        builder.build(tools=ToolGrammar(functions=tuple(slow), mode="auto", style="jamba"))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
        {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9},
        {"type": "array", "minItems": 10**9},
        {"enum": [f"value {number}" for number in range(10_000)]},
        referring({"a": {"type": "object", "properties": {"n": {"$ref": "#/$defs/a"}}}}),
        referring({"a": {"items": {"$ref": "#/$defs/a"}, "type": "array"}}),
    ],
)
def test_what_only_looks_dangerous_is_accepted(builder: GrammarBuilder, schema: dict[str, Any]) -> None:
    assert builder.build(OutputFormat(kind="json_schema", value=schema))


def test_answers_are_remembered_and_outlive_the_process() -> None:
    texts: list[int] = []

    def tokenizer_json() -> str:
        texts.append(os.getpid())
        return build_tokenizer("reasoning").to_str()

    check = CompileCheck(tokenizer_json, eos_token_id=IM_END)
    try:
        assert check.outcome('start: "a"') == Outcome()
        check.close()
        assert check.outcome('start: "a"') == Outcome()
        assert len(texts) == 1  # no process was started for the second answer
        assert check.outcome("start: b").error
        assert len(texts) == 2
    finally:
        check.close()


def test_a_process_that_was_ended_from_outside_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    check = CompileCheck(build_tokenizer("reasoning").to_str, eos_token_id=IM_END)
    try:
        assert check.outcome('start: "a"') == Outcome()
        started[0].kill()
        started[0].wait()
        assert check.outcome('start: "b"') == Outcome()
        assert len(started) == 2
    finally:
        check.close()
    assert [process.poll() for process in started] == [-signal.SIGKILL, -signal.SIGKILL]


def test_a_tokenizer_that_llguidance_cannot_read_is_told() -> None:
    check = CompileCheck(lambda: "{}", eos_token_id=0)
    assert "tokenizer cannot be used with grammars" in check.outcome('start: "a"').error


SLOW = "start: %json " + json.dumps({"type": "integer", "multipleOf": 999_983})


def test_the_checks_of_a_request_have_an_allowance() -> None:
    texts: list[int] = []

    def tokenizer_json() -> str:
        texts.append(os.getpid())
        return build_tokenizer("reasoning").to_str()

    check = CompileCheck(tokenizer_json, eos_token_id=IM_END)
    try:
        with pytest.raises(OverAllowance):
            check.outcome('start: "a"', Allowance(0, final=False))
        assert not texts
        assert check.outcome('start: "a"', Allowance(0.1, final=False)) == Outcome()
        assert check.outcome('start: "a"', Allowance(0, final=False)) == Outcome()
        for number in range(5):
            with pytest.raises(OverAllowance):
                check.outcome(f"{SLOW}\n// {number}", Allowance(0.02, final=False))
        assert check.outcome('start: "b"', Allowance(0.1, final=False)) == Outcome()
        assert len(texts) == 1  # the tokenizer was loaded once, although five checks were stopped
        rest = Allowance(0.05)
        stopped = check.outcome(SLOW, rest)
        assert stopped.too_complex and "all checks for this request" in stopped.error
        assert rest.seconds <= 0
        assert "all checks for this request" in check.outcome('start: "c"', rest).error
        assert check.outcome('start: "c"') == Outcome()  # the earlier answer was not about this grammar alone
    finally:
        check.close()


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAMBA_API_KEY", "secret")
    process = CheckerProcess()
    try:
        assert process.exchange(Setup(build_tokenizer("reasoning").to_str(), IM_END)) == Verdict()
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        assert {entry.partition(b"=")[0] for entry in variables} <= {b"", b"PYTHONPATH", b"LD_LIBRARY_PATH"}
    finally:
        process.end()


def test_a_child_of_the_process_that_was_killed_gives_no_later_grammar_a_wrong_answer() -> None:
    check = CompileCheck(build_tokenizer("reasoning").to_str, eos_token_id=IM_END)
    try:
        assert check.outcome('start: "a"') == Outcome()
        process = check._lanes[True]._process  # pyright: ignore[reportPrivateUsage]
        assert process is not None
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert "interrupted" in check.outcome("start: b").error
        assert check.outcome('start: "c"') == Outcome()
        assert "interrupted" not in check.outcome("start: b").error
    finally:
        check.close()
