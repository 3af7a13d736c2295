"""Grammars of tool calls, in both styles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.reply import build_grammar
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar, ToolStyle
from tests.grammars.matching import CLOSING, accepts, closing, generated, matcher
from tools.schema_suite import TAGS, Function, builder, functions, refuses

SAMPLE = Path(__file__).parent.parent / "data" / "tool-calls" / "bfcl-sample.jsonl"
WEATHER = Function(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
TIME = Function(name="time", parameters={"type": "object", "properties": {}})
BLOCKS = {
    "hermes": re.compile(r"<tool_call>\n(.*)\n</tool_call>\n?"),
    "jamba": re.compile(r"<tool_calls>(\[\n    .*\n\])</tool_calls>", re.DOTALL),
}
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ROME = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}'
NOW = '{"name": "time", "arguments": {}}'
STYLES: tuple[ToolStyle, ...] = ("jamba", "hermes")


def block(style: ToolStyle, *calls: str) -> str:
    """Calls as the chat templates of the models show them."""
    if style == "jamba":
        return "<tool_calls>[\n    " + ",\n    ".join(calls) + "\n]</tool_calls>"
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def grammar_of(
    *called: Function,
    mode: Literal["required", "auto"] = "required",
    style: ToolStyle = "hermes",
    parallel: bool = True,
    **more: Any,
) -> str:
    return builder().build(tools=ToolGrammar(functions=called, mode=mode, style=style, parallel=parallel), **more)


def calls_in(text: str, style: ToolStyle) -> list[dict[str, Any]]:
    """The calls of a reply that consists of calls."""
    found = [json.loads(match) for match in BLOCKS[style].findall(text)]
    assert BLOCKS[style].sub("", text) == ""
    return found if style == "hermes" else [call for calls in found for call in cast("list[Any]", calls)]


@pytest.mark.parametrize("style", STYLES)
def test_required_calls_are_written_as_the_template_shows_them(style: ToolStyle) -> None:
    follower = matcher(grammar_of(WEATHER, TIME, style=style))
    for calls in ([PARIS], [PARIS, ROME], [NOW, PARIS, NOW]):
        assert accepts(follower, block(style, *calls))
        assert not accepts(follower, "Sure. " + block(style, *calls))
        assert not accepts(follower, " " + block(style, *calls))
    assert not accepts(follower, "")
    assert not accepts(follower, block(style, PARIS.replace(": ", ":")))
    assert not accepts(follower, block(style, PARIS.replace("get_weather", "get_time")))
    assert not accepts(follower, block(style, '{"name": "get_weather", "arguments": {"days": 3}}'))
    assert not accepts(follower, block(style, '{"name": "get_weather", "arguments": {"city": "a", "b": 1}}'))
    alone = matcher(grammar_of(WEATHER, TIME, style=style, parallel=False))
    assert accepts(alone, block(style, PARIS))
    assert not accepts(alone, block(style, PARIS, ROME))
    spaced = matcher(grammar_of(WEATHER, style=style, leading_space=True, reasoning=ReasoningGrammar(opened=True)))
    assert accepts(spaced, "I need\nit</think>\n\n " + block(style, PARIS))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("parallel", [True, False])
def test_with_auto_text_is_free_and_calls_are_not(style: ToolStyle, parallel: bool) -> None:
    follower = matcher(grammar_of(WEATHER, TIME, style=style, mode="auto", parallel=parallel))
    for text in ("", "Hello", ' {"a": \n', "<tool", "<citations>a <b> </tool"):
        assert accepts(follower, text)
        assert accepts(follower, f"{text}{block(style, PARIS)}{text}")
        assert accepts(follower, f"{text}{block(style, PARIS)}{text}{block(style, NOW)}") == parallel
        assert not accepts(follower, f"{text}{block(style, '{}')}{text}")
        assert not accepts(follower, f"{text}{block(style, PARIS)[:-1]}")
    opening = "<tool_calls>" if style == "jamba" else "<tool_call>"
    follower.reset()
    assert follower.try_consume_tokens(list(opening.encode())) == len(opening) - 1  # the tag cannot be spelled
    follower.reset()
    assert follower.consume_token(TAGS[opening])
    assert follower.compute_ff_bytes().decode().startswith('[\n    {"name": "' if style == "jamba" else '\n{"name": "')


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("opened", [True, False])
def test_with_auto_a_call_may_follow_thoughts(style: ToolStyle, opened: bool) -> None:
    reasoning = ReasoningGrammar(opened=opened)
    follower = matcher(grammar_of(WEATHER, style=style, mode="auto", reasoning=reasoning))
    before = "" if opened else "<think>"
    tag = "<tool_calls>" if style == "jamba" else "<tool_call>"
    assert accepts(follower, f"{before}a {tag} b</think>\n\nSure.{block(style, PARIS)}")
    assert not accepts(follower, f"{before}a</think>\n\n{block(style, '{}')}")
    assert accepts(follower, "Sure." + block(style, PARIS))
    assert accepts(follower, "Sure." + block(style, "{}")) == opened  # what looks like a call is a part of the thoughts
    assert accepts(follower, f"{before}a") == opened


@pytest.mark.parametrize("style", STYLES)
def test_with_auto_and_a_format_the_reply_is_one_or_the_other(style: ToolStyle) -> None:
    form = OutputFormat(kind="json_object")
    follower = matcher(grammar_of(WEATHER, style=style, mode="auto", format=form))
    assert accepts(follower, '{"a":1}')
    assert accepts(follower, block(style, PARIS, ROME))
    assert not accepts(follower, '{"a":1}' + block(style, PARIS))
    assert not accepts(follower, "Hello")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["required", "auto"])
def test_tags_may_be_ordinary_text(style: ToolStyle, mode: Any) -> None:
    tools = ToolGrammar(functions=(WEATHER, TIME), mode=mode, style=style)
    follower = matcher(build_grammar(None, tools, token_ids={}))

    def takes(text: str) -> bool:
        follower.reset()
        token_ids = list(text.encode())
        return follower.try_consume_tokens(token_ids) == len(token_ids) and follower.is_accepting()

    assert takes(block(style, PARIS, NOW))
    assert not takes(block(style, "{}"))
    for text in ("", "Hello <tool", "<<"):
        assert takes(text) == (mode == "auto")
        assert takes(text + block(style, PARIS)) == (mode == "auto" or not text)
        assert not takes(text + block(style, PARIS) + block(style, "{}"))


def test_types_of_programming_languages_are_json_schemas() -> None:
    parameters = {
        "type": "dict",
        "properties": {
            "a": {"type": "float"},
            "b": {"type": "tuple", "items": {"type": "int"}},
            "c": {"type": "any"},
            "d": {"type": ["str", "none"]},
            "e": {"type": "Boolean", "optional": True},
            "f": {"type": "dict", "properties": {"g": {"type": "String"}}},
        },
        "required": ["a", "b", "c", "d"],
    }
    follower = matcher(grammar_of(Function(name="f", parameters=parameters)))
    before, after = '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"
    right = '{"a": 1.5, "b": [1, 2], "c": {"x": null}, "d": null, "e": true, "f": {"g": "h"}}'
    assert accepts(follower, before + right + after)
    for old, new in (("1.5", '"1"'), ("[1, 2]", '["a"]'), ("null,", "1,"), ("true", "1"), ('"g"', '"k"')):
        assert not accepts(follower, before + right.replace(old, new) + after)


@pytest.mark.parametrize(
    ("parameters", "any_allowed"),
    [
        ({}, False),
        ({"type": "object", "properties": {}}, False),
        ({"type": "object"}, True),
        ({"type": "string"}, True),
    ],
)
def test_a_function_without_properties(parameters: dict[str, Any], any_allowed: bool) -> None:
    follower = matcher(grammar_of(Function(name="time", parameters=parameters)))
    assert accepts(follower, block("hermes", NOW))
    assert accepts(follower, block("hermes", NOW.replace("{}", '{"a": [1]}'))) == any_allowed
    assert not accepts(follower, block("hermes", NOW.replace("{}", '"a"')))


SLOPPY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "file", "required": True},
        "b": {"type": "string", "pattern": "^(?!x)\\w+\\b", "format": "iri", "minLength": "1"},
        "c": 5,
        "d": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 1e-9}]},
        "e": {"type": "integer", "maximum": 2**64, "enum": [1, 2**60]},
    },
    "required": ["e"],
    "minProperties": 3,
}


def test_a_sloppy_schema_is_followed_where_it_can_be() -> None:
    follower = matcher(grammar_of(Function(name="time", parameters=SLOPPY)))
    for arguments in ('{"a": [1], "b": "xé y", "c": null, "d": 1.5, "e": 7}', '{"e": 1}'):
        assert accepts(follower, block("hermes", NOW.replace("{}", arguments)))
    for arguments in ('{"d": 1}', '{"b": 1, "e": 1}', '{"d": "1", "e": 1}', '{"e": "1"}', '{"e": 1, "f": 1}'):
        assert not accepts(follower, block("hermes", NOW.replace("{}", arguments)))
    with pytest.raises(RequestRejected):
        grammar_of(Function(name="time", parameters=SLOPPY, strict=True))


def test_what_cannot_be_enforced_is_refused_if_strict_and_left_out_otherwise() -> None:
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer", "not": {"const": 5}}},
        "required": ["a"],
    }
    before, after = '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"
    follower = matcher(grammar_of(Function(name="f", parameters=parameters)))
    assert accepts(follower, before + '{"a": 5}' + after)
    assert not accepts(follower, before + '{"a": "5"}' + after)
    with pytest.raises(RequestRejected, match="`not` at #/properties/a/not") as caught:
        grammar_of(TIME, Function(name="f", parameters=parameters, strict=True, param="tools.1.function.parameters"))
    assert caught.value.param == "tools.1.function.parameters"

    parameters["properties"]["a"] = {"patternProperties": {"a": {}, "b": {}}}  # llguidance refuses this one
    follower = matcher(grammar_of(WEATHER, Function(name="f", parameters=parameters)))
    assert accepts(follower, before + '{"b": 5}' + after)
    assert not accepts(follower, before + "5" + after)
    assert not accepts(follower, block("hermes", PARIS.replace("city", "town")))  # the other function is followed
    with pytest.raises(RequestRejected, match="`patternProperties` at #/properties/a/pattern") as caught:
        grammar_of(TIME, Function(name="f", parameters=parameters, strict=True, param="tools.1.function.parameters"))
    assert caught.value.param == "tools.1.function.parameters"


@pytest.mark.parametrize("name", ['qu"ote', "back\\slash", "mü.nz-1_é", "a/b", "new\nline"])
def test_names_have_any_characters(name: str) -> None:
    follower = matcher(grammar_of(Function(name=name)))
    call = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    assert accepts(follower, block("hermes", call))


def json_schema(parameters: Any) -> Any:
    """The schema of a function of the leaderboard with JSON Schema's names of types, for jsonschema."""
    if isinstance(parameters, list):
        return [json_schema(part) for part in cast("list[Any]", parameters)]
    if not isinstance(parameters, dict):
        return {"dict": "object", "float": "number", "tuple": "array"}.get(parameters, parameters)
    return {key: json_schema(part) for key, part in cast("dict[str, Any]", parameters).items()}


def test_real_functions_are_accepted() -> None:
    sample = list(functions(SAMPLE))
    assert len(sample) >= 50
    for strict in (True, False):
        assert sum(refuses(function, strict=strict) for function in sample) <= 0.1 * len(sample)


@pytest.mark.parametrize("style", STYLES)
def test_every_call_of_a_model_with_random_weights_is_valid(style: ToolStyle) -> None:
    rng = np.random.default_rng(1)
    ended = 0
    sample = list(functions(SAMPLE))
    for number, function in enumerate(sample):
        other = sample[number - 1]
        text = generated(grammar_of(function, other, style=style), rng, limit=1000, favoured=closing())
        if text is None:
            continue
        ended += 1
        calls = calls_in(text, style)
        assert calls
        for call in calls:
            assert call.keys() == {"name", "arguments"}
            [called] = [known for known in (function, other) if known.name == call["name"]][:1]
            schemas = [json_schema(known.parameters) for known in (function, other) if known.name == called.name]
            assert any(Draft202012Validator(schema).is_valid(call["arguments"]) for schema in schemas), call
    assert ended >= 0.8 * len(sample)


def test_with_auto_every_call_of_a_model_with_random_weights_is_valid() -> None:
    rng = np.random.default_rng(2)
    grammar = grammar_of(WEATHER, TIME, mode="auto")
    favoured = closing() | {TAGS["<tool_call>"]: CLOSING, TAGS["</tool_call>"]: CLOSING}
    num_calls = 0
    for _ in range(40):
        text = generated(grammar, rng, limit=400, favoured=favoured)
        if text is None:
            continue
        bodies = re.findall(r"<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL)
        assert len(bodies) == text.count("<tool_call>")
        for body in bodies:
            call = json.loads(body)
            function = {"get_weather": WEATHER, "time": TIME}[call["name"]]
            Draft202012Validator(function.parameters).validate(call["arguments"])
            num_calls += 1
    assert num_calls >= 10
