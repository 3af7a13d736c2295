"""Grammars of whole replies: content of every form, thoughts before it, leading spaces."""

from __future__ import annotations

from typing import Any

import pytest

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.reply import build_grammar
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar
from tests.grammars.matching import accepts, compact, matcher
from tools.schema_suite import builder

OPENED = ReasoningGrammar(opened=True)
MAYBE = ReasoningGrammar(opened=False)
JSON = OutputFormat(kind="json_object")


def taken(grammar: str, *texts: str) -> list[bool]:
    follower = matcher(grammar)
    return [accepts(follower, text) for text in texts]


def test_without_requirements_there_is_no_grammar() -> None:
    assert builder().build() == ""
    assert builder().build(reasoning=OPENED, leading_space=True) == ""


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("json_object", None, ["{}", '{"a":{"b":[1,null,"é"]}}'], ["[]", "1", '{"a":}', "{} "]),
        ("json_schema", {"type": "integer"}, ["5", "-0"], ["5.5", '"5"', "true"]),
        ("json_schema", True, ["5", '"a"', "{}"], ["", "a"]),
        ("json_schema", {}, ["5", '"a"', "[]"], ["[1,]"]),
        ("regex", "a+b", ["ab", "aab"], ["b", "xab", "abx"]),
        ("regex", "^(a|b)$", ["a", "b"], ["ab", "^a$"]),
        ("regex", "^a|b$", ["a", "b"], ["ax", "xb"]),
        ("regex", "a/b\\/c", ["a/b/c"], ["a\\/b/c"]),
        ("regex", "[a-z]{2}\\n\n", ["ab\n\n"], ["ab\n"]),
        ("regex", "[0-9]{4}-[0-9]{2}", ["2024-01"], ["2024-1"]),
        ("choice", ("yes", "yes, sir", 'quo"te\\', "é😀\n"), ["yes", "yes, sir", 'quo"te\\', "é😀\n"], ["no", "yes,"]),
        ("choice", ("", "a"), ["", "a"], ["b"]),
        ("lark", 'start: "a" b+\nb: "b" | "c"', ["ab", "abcb"], ["a", "b"]),
        ("lark", 'start: "x" %json {"type": "integer"}', ["x1"], ["x", "xa"]),
    ],
)
def test_content_has_its_form(kind: Any, value: Any, right: list[str], wrong: list[str]) -> None:
    form = OutputFormat(kind=kind, value=value)
    assert taken(builder().build(form), *right) == [True] * len(right)
    assert taken(builder().build(form), *wrong) == [False] * len(wrong)
    thought = "<think>\nhm <tool_call> {</think>\n\n"
    for reasoning, before in ((OPENED, thought.removeprefix("<think>")), (MAYBE, thought), (MAYBE, "")):
        grammar = builder().build(form, reasoning=reasoning)
        assert taken(grammar, *[before + text for text in right]) == [True] * len(right)
        assert taken(grammar, *[before + text for text in wrong]) == [False] * len(wrong)
    grammar = builder().build(form, leading_space=True)
    assert taken(grammar, *[" " + text for text in right]) == [True] * len(right)
    assert not any(taken(grammar, *["  " + text for text in right]))


def test_thoughts_end_with_their_tag_only() -> None:
    follower = matcher(builder().build(JSON, reasoning=OPENED))
    assert accepts(follower, "</think>\n\n{}")
    assert not accepts(follower, "{}")
    assert not accepts(follower, "a</think>{}")
    assert not accepts(follower, "a</think>\n\n{}</think>\n\n{}")
    spelled = [*b"a</think", *b">\n\n{}"]  # the tag's characters as ordinary tokens
    follower.reset()
    assert follower.try_consume_tokens(spelled) == len(b"a</think")


@pytest.mark.parametrize("reasoning", [OPENED, MAYBE])
def test_tags_may_be_ordinary_text(reasoning: ReasoningGrammar) -> None:
    follower = matcher(build_grammar(JSON, None, reasoning, token_ids={}))

    def takes(text: str) -> bool:
        follower.reset()
        token_ids = list(text.encode())
        return follower.try_consume_tokens(token_ids) == len(token_ids) and follower.is_accepting()

    before = "" if reasoning.opened else "<think>"
    assert takes(before + "so < / </thin</think>\n\n{}")
    assert not takes(before + "so{}")
    assert not takes(before + "so</think>\n\n{}</think>\n\n{}")
    assert takes("{}") != reasoning.opened


def test_a_grammar_in_another_form_is_an_error() -> None:
    with pytest.raises(RequestRejected, match="grammar is refused") as caught:
        builder().build(OutputFormat(kind="lark", value='root = "a"', param="structured_outputs.grammar"))
    assert caught.value.param == "structured_outputs.grammar"


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"properties": {"a": {"not": {}}}}, "`not` at #/properties/a/not"),
        ({"items": {"if": {}, "then": False}}, "`if` at #/items/if"),
        ({"anyOf": [{}, {"uniqueItems": True}]}, "`uniqueItems` at #/anyOf/1/uniqueItems"),
        ({"contains": {"type": "integer"}}, "`contains` at #/contains"),
        ({"unevaluatedProperties": False}, "`unevaluatedProperties` at #/unevaluatedProperties"),
        ({"dependentSchemas": {"a": {}}}, "`dependentSchemas` at #/dependentSchemas"),
        ({"propertyNames": {"maxLength": 3}}, "`propertyNames` at #/propertyNames"),
        ({"minProperties": 2}, "`minProperties` at #/minProperties"),
        ({"$defs": {"x/y": {"$dynamicRef": "#a"}}}, "`$dynamicRef` at #/$defs/x~1y/$dynamicRef"),
        ({"properties": {"a": {"oneOf": [{}, {}]}, "b": {"oneOf": [{"type": "null"}]}}}, "at #/properties/a/oneOf"),
        ({"properties": {"a": {"pattern": "(?=a)b"}, "b": {"pattern": "b"}}}, "`pattern` at #/properties/a/pattern"),
        ({"patternProperties": {"a": {}, "b": {}}}, "`patternProperties` at #/patternProperties"),
        ({"type": "number", "multipleOf": 0.123456789}, "`multipleOf` at #/multipleOf"),
        ({"$ref": "http://a.example/b"}, '#/$ref is "http://a.example/b"'),
        ({"items": {"$ref": "#/$defs/a"}}, '#/items/$ref is "#/$defs/a"'),
        ({"type": "string", "format": "iri"}, '#/format is "iri"'),
        ({"type": "strin"}, '#/type is "strin"'),
        ({"const": 2**53 + 1}, "#/const is 9007199254740993"),
        ({"enum": [1, {"a": [1e300]}]}, "#/enum is 1e+300"),
        ({"minimum": 1e-9}, "#/minimum is 1e-09"),
        ({"maxLength": -1}, "#/maxLength is -1"),
        ({"maxItems": 1.5}, "#/maxItems is 1.5"),
        ({"maxItems": float("inf")}, "#/maxItems is Infinity"),
        ({"maximum": float("nan")}, "#/maximum is NaN"),
        ({"type": [["string"]]}, "#/type is a list"),
        ({"enum": 5}, "cannot be enforced"),
        ({"const": "a\ud800"}, "surrogate"),
        ({"properties": []}, "#/properties is a list"),
        ({"items": 5}, "#/items is 5"),
        ({"required": "a"}, '#/required is "a"'),
        ({"pattern": 5}, "#/pattern is 5"),
        ({"minimum": "a"}, '#/minimum is "a"'),
        ({"$ref": 5}, "#/$ref is 5"),
        ({"format": 5}, "#/format is 5"),
        (
            {"properties": {"a": {"type": "string", "enum": [1]}}, "required": ["a"], "type": "object"},
            "allows no value",
        ),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "The schema at # allows no value"),
        (False, "allows no value"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_name_and_path(schema: Any, where: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        builder().build(OutputFormat(kind="json_schema", value=schema, param="here"))
    assert where in str(caught.value)
    assert caught.value.param == "here"
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "schema",
    [
        {"uniqueItems": False, "if": {"type": "string"}, "unevaluatedItems": True, "dependentRequired": {}},
        {"then": False, "else": False, "maxContains": 1, "propertyNames": {"type": "string"}},
        {"contains": False, "minContains": 0, "unevaluatedProperties": {}},
        {"title": "x", "description": "y", "default": {"a": 1}, "examples": [1], "x-note": {"not": {}}, "nullable": 1},
    ],
)
def test_keywords_without_effect_are_left_out(schema: dict[str, Any]) -> None:
    follower = matcher(builder().build(OutputFormat(kind="json_schema", value=schema)))
    assert all(accepts(follower, compact(value)) for value in ([1, 1], "a", {"a": 1}, None))


def test_the_clients_options_for_llguidance_have_no_effect() -> None:
    schema = {"x-guidance": {"lenient": True, "whitespace_flexible": True}, "type": "integer"}
    assert taken(builder().build(OutputFormat(kind="json_schema", value=schema)), "5", " 5") == [True, False]
