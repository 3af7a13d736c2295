"""JSON schemas as grammars, against the JSON-Schema-Test-Suite and the package jsonschema."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.string_formats import BUILT_IN, PATTERNS
from jamba_server.server.text.grammars.types import OutputFormat
from tests.grammars.matching import accepts, closing, compact, generated, matcher, orders
from tools.schema_suite import builder, groups

# Valid texts that are never generated: docs/structured-outputs.md says so.
NARROWER = {
    "optional/format/hostname": ("xn--",),
    "optional/format/date-time": ("15:59:60.123-08:00",),
    "optional/format/time": (":60+", ":60-"),
}
# jsonschema reads patterns with Python's `re`, which lacks some escapes and matches others of Unicode.
OTHER_REGEX = re.compile(r"\\[pPcdDwW]")
GENERATIONS = 2  # for each schema
MAX_TOKENS = 400


def grammar_of(schema: Any) -> str:
    return builder().build(OutputFormat(kind="json_schema", value=schema))


@cache
def accepted() -> list[tuple[dict[str, Any], str]]:
    """The groups of the suite whose schema is accepted, with their grammars."""
    found: list[tuple[dict[str, Any], str]] = []
    for group in groups():
        try:
            found.append((group, grammar_of(group["schema"])))
        except RequestRejected:
            continue
    return found


def is_judged(group: dict[str, Any], case: dict[str, Any]) -> bool:
    """In the file `format`, formats are notes that restrict nothing. Here they are enforced, as the files
    `optional/format/*` have it."""
    if group["file"] == "format" and isinstance(case["data"], str):
        return False
    parts = NARROWER.get(group["file"], ())
    return not (case["valid"] and any(part in str(case["data"]) for part in parts))


def test_a_good_part_of_the_suite_is_accepted() -> None:
    assert len(accepted()) >= 225


def test_every_valid_instance_is_accepted_and_no_invalid_one() -> None:
    wrong: list[str] = []
    judged: Counter[bool] = Counter()
    for group, grammar in accepted():
        follower = matcher(grammar)
        for case in group["tests"]:
            if is_judged(group, case):
                judged[case["valid"]] += 1
                if any(accepts(follower, compact(value)) for value in orders(case["data"])) != case["valid"]:
                    wrong.append(f"{group['file']}: {group['description']}: {case['description']}")
    assert wrong == []
    assert judged[True] > 500
    assert judged[False] > 500


def test_most_generations_end_and_all_of_those_are_valid() -> None:
    rng = np.random.default_rng(0)
    checker = jsonschema.FormatChecker(("ipv4", "ipv6", "date", "uuid"))
    wrong: list[tuple[str, str, str]] = []
    ended: list[bool] = []
    for group, grammar in accepted():
        if OTHER_REGEX.search(json.dumps(group["schema"])):
            continue
        validator = Draft202012Validator(group["schema"], format_checker=checker)
        for _ in range(GENERATIONS):
            text = generated(grammar, rng, limit=MAX_TOKENS, favoured=closing())
            ended.append(text is not None)
            if text is not None and not validator.is_valid(json.loads(text)):
                wrong.append((group["file"], group["description"], text))
    assert wrong == []
    assert sum(ended) >= 0.8 * len(ended)


@pytest.mark.parametrize("name", sorted(BUILT_IN | PATTERNS.keys()))
def test_a_format_stands_beside_a_pattern_and_other_types(name: str) -> None:
    valid = {
        "date": "2024-02-29",
        "date-time": "2024-02-29T12:00:00Z",
        "duration": "P1D",
        "email": "a@b.cd",
        "hostname": "a.example",
        "ipv4": "1.2.3.4",
        "ipv6": "::1",
        "json-pointer": "/a/0",
        "relative-json-pointer": "0/a",
        "time": "12:00:00Z",
        "uri": "http://a.example/b",
        "uuid": "00000000-0000-0000-0000-00000000000a",
    }[name]
    follower = matcher(grammar_of({"type": ["string", "integer"], "format": name}))
    assert accepts(follower, compact(valid))
    assert accepts(follower, "5")
    assert not accepts(follower, '"~"')
    follower = matcher(grammar_of({"format": name, "pattern": "^[^~]+$", "allOf": [{"enum": [valid, "~", 1]}]}))
    assert [text for text in (valid, "~", 1) if accepts(follower, compact(text))] == [valid, 1]


def test_properties_come_in_the_order_of_the_schema() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["c", "a"], "additionalProperties": {}}
    follower = matcher(grammar_of(schema))
    assert accepts(follower, '{"b":1,"a":2,"c":3,"d":4}')
    assert not accepts(follower, '{"a":2,"b":1,"c":3}')
    assert not accepts(follower, '{"b":1,"c":3,"a":2}')


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a":1 }', '{"a":[1, 2]}', '{"a":1}\n', ' {"a":1}'])
def test_there_is_no_optional_white_space(text: str) -> None:
    for grammar in (grammar_of({"type": "object"}), builder().build(OutputFormat(kind="json_object"))):
        assert not accepts(matcher(grammar), text)
        assert accepts(matcher(grammar), compact(json.loads(text)))


def test_a_property_is_not_hidden_by_an_escape() -> None:
    """llguidance lets "\\u0061" through as the name of an unnamed property, although it spells "a"."""
    follower = matcher(grammar_of({"type": "object", "properties": {"a": {"type": "string"}}}))
    assert not accepts(follower, '{"\\u0061":1}')
    assert accepts(follower, '{"b":1}')


@pytest.mark.parametrize(
    ("pattern", "found", "missed"),
    [
        ("^.$", ["a", "\u0085"], ["\r", "\n", "\u2028", ""]),
        ("^\\s$", [" ", "\ufeff", "\t"], ["\u0085", "a"]),
        ("^[\\s]$", [" ", "\ufeff"], ["\u0085"]),
        ("^[^\\S]$", [" ", "\ufeff"], ["\u0085", "a"]),
        ("^\\w\\d$", ["a1", "_0"], ["é1", "a\u0661"]),
        ("^a+?b*?$", ["a", "aab"], ["b"]),
        ("^[a[b&&c~]$", ["a", "[", "&", "c", "~"], ["]", ""]),
        ("\\cA", ["\x01", "x\x01y"], ["A"]),
        ("^a|b$", ["ax", "xb"], ["x"]),
        ("^a/b\\/$", ["a/b/"], ["a"]),
        ("^(?:a|b){2,3}$", ["ab", "aba"], ["a", "abab"]),
        ("^(?<year>\\d{4})$", ["2024"], ["24"]),
        ("a{2}", ["aa", "baab"], ["a"]),
    ],
)
def test_patterns_mean_what_they_mean_in_ecmascript(pattern: str, found: list[str], missed: list[str]) -> None:
    follower = matcher(grammar_of({"type": "string", "pattern": pattern}))
    assert [text for text in found if not accepts(follower, compact(text))] == []
    assert [text for text in missed if accepts(follower, compact(text))] == []
