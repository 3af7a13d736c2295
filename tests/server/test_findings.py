"""What a client is told of a value that does not fit: our own sentences, which name field, value and limit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from jamba_server.server.http.findings import MAX_VALUE_CHARS, describe_finding, param_of, short_json
from jamba_server.server.http.schemas.batches import BatchRequest
from jamba_server.server.http.schemas.chat import ChatCompletionRequest
from jamba_server.server.http.schemas.completions import CompletionRequest
from jamba_server.server.http.schemas.models import DetokenizeRequest, TokenizeRequest
from jamba_server.server.http.schemas.sessions import ForkRequest, PinRequest
from jamba_server.server.http.schemas.vectors.classify import ClassifyRequest
from jamba_server.server.http.schemas.vectors.decisions import DecisionRequest
from jamba_server.server.http.schemas.vectors.embeddings import EmbeddingRequest, PoolingRequest
from jamba_server.server.http.schemas.vectors.scoring import RerankRequest, ScoreRequest

MISFITS: list[Any] = [
    None, True, 0, -7, 10**30, 1.5, float("nan"), 1e300, "", " ", "text", "x" * 5000, "\ud800",
    [], [""], [None], [-1], ["x" * 5000], ["a"] * 5000, [1] * 5000, [[]], [{}],
    {}, {"a": 1}, {"1": 1e9}, {"type": "json_object"}, {str(n): 1 for n in range(400)},
]  # fmt: skip
BODIES: dict[type[BaseModel], dict[str, Any]] = {
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "a"}], "stream": True},
    CompletionRequest: {"prompt": "a", "stream": True},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
    EmbeddingRequest: {"input": "a"},
    PoolingRequest: {"input": "a"},
    ClassifyRequest: {"input": "a"},
    ScoreRequest: {"text_1": "a", "text_2": "b"},
    RerankRequest: {"query": "a", "documents": ["b"]},
    DecisionRequest: {"input": "a", "questions": [{"type": "predicate", "instructions": "b"}]},
    BatchRequest: {"input_file_id": "a", "endpoint": "/v1/completions", "completion_window": "24h"},
    PinRequest: {"seconds": 1},
    ForkRequest: {"id": "a"},
}
# how pydantic words its errors
FOREIGN = re.compile(r"Input|should|[Vv]alid (?!Unicode)|validation|Field|parse|instance|Value error|type=|pydantic")


def findings(schema: type[BaseModel], body: Any) -> list[Any]:
    try:
        schema.model_validate(body)
    except ValidationError as error:
        return [{**finding, "loc": ("body", *finding["loc"])} for finding in error.errors()]
    return []


def check(finding: Any, field: str) -> None:
    sentence = describe_finding(finding)
    assert not FOREIGN.search(sentence), sentence
    assert sentence.startswith(f"{param_of(finding)} ")
    assert (param_of(finding) or "").split(".")[0] == field or field in sentence
    assert len(sentence) < 300
    assert "which is not allowed here" not in sentence, finding  # a kind of error without a sentence of its own
    if finding["type"] not in ("missing", "invalid", "not_supported_yet"):
        assert "; it " in sentence or "must " in sentence or "allowed" in sentence or "; a word" in sentence, sentence


@pytest.mark.parametrize("schema", BODIES, ids=lambda schema: schema.__name__)
def test_every_field_with_everything_that_does_not_fit(schema: type[BaseModel]) -> None:
    seen: set[str] = set()
    for field in schema.model_fields:
        for value in MISFITS:
            for finding in findings(schema, BODIES[schema] | {field: value}):
                check(finding, field)
                seen.add(finding["type"])
    assert len(seen) > 2


@pytest.mark.parametrize("kind", ["choice", "score"])
def test_decisions_with_everything_that_does_not_fit(kind: str) -> None:
    options = {"choices": [{"value": "a"}, {"value": True}], "levels": [{"label": "a"}, {"label": "b"}]}
    for value in MISFITS:
        for question in (
            value,
            {"type": kind, "instructions": value, **options},
            {"type": kind, "instructions": [{"type": "input_json", "data": value}], **options},
            {"type": kind, "instructions": "a", **options, "choices": value, "levels": value},
            {"type": kind, "instructions": "a", "choices": [{"value": value}] * 2, "levels": [{"label": value}] * 2},
        ):
            for finding in findings(DecisionRequest, {"input": "a", "questions": [question]}):
                check(finding, "questions")
                assert not re.search(r"\b(str|bool|dict|list)\b", param_of(finding) or ""), finding


def test_messages_with_everything_that_does_not_fit() -> None:
    for value in MISFITS:
        for field in ("role", "content", "name", "tool_calls", "refusal"):
            message = {"role": "user", "content": "a", field: value}
            for finding in findings(ChatCompletionRequest, {"messages": [message]}):
                check(finding, "messages")
        for part in (value, {"type": value}, {"type": "text", "text": value}):
            body = {"messages": [{"role": "user", "content": [part]}]}
            for finding in findings(ChatCompletionRequest, body):
                check(finding, "messages")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages has 0 items; it needs at least 1"),
        ({"temperature": 2.5}, "temperature is 2.5; it must be at most 2"),
        ({"top_p": 0}, "top_p is 0; it must be above 0"),
        ({"n": "three"}, 'n is "three"; it must be a whole number'),
        ({"stop": ["a", ""]}, "stop.1 is empty; it needs at least one character"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be at most {2**63 - 1}"),
        ({"tools": [{"type": "function"}]}, "tools.0.function is required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            'tools.0.function.name is "a b"; it must match ^[a-zA-Z0-9_.:/-]{1,128}$',
        ),
        (
            {"tool_choice": 1},
            'tool_choice is 1; it must be "none", "auto", "required" or an object that names functions',
        ),
        ({"tool_choice": "any"}, "tool_choice is \"any\"; it must be 'none', 'auto' or 'required'"),
        ({"tool_choice": "required"}, "tool_choice requires a call, but `tools` has no functions"),
        (
            {"response_format": {"type": "x"}},
            'response_format is an object of the type "x"; '
            "it must be an object whose type is 'text', 'json_object' or 'json_schema'",
        ),
        ({"stop": {"a": 1}}, "stop is an object; it must be a string or a list of strings"),
        (
            {"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]},
            'messages.0.content is an object of the type "text"; it must be a string or a list of text parts',
        ),
        ({"logit_bias": {"2": 1, "the": 1}}, "logit_bias has the key 'the'; every key must be a token id, like '2'"),
        ({"stream": "yes" * 5000}, f'stream is "{("yes" * 5000)[:MAX_VALUE_CHARS]}…"; it must be true or false'),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_tokens is 5, but `max_completion_tokens` is 6; send one of them",
        ),
        ({"top_logprobs": 3}, "top_logprobs is only allowed with `logprobs`: true"),
    ],
)  # fmt: skip
def test_sentences(fields: dict[str, Any], sentence: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} | fields
    assert [describe_finding(finding) for finding in findings(ChatCompletionRequest, body)] == [sentence]


def test_a_batch_that_takes_too_long_names_the_limit() -> None:
    [finding] = findings(BatchRequest, BODIES[BatchRequest] | {"completion_window": "31d"})
    assert describe_finding(finding) == 'completion_window is "31d"; it must be at most 30d'


def test_values_are_shown_in_a_few_characters() -> None:
    values = [*MISFITS, [[1] * 10**6], {"a": "b" * 10**6}, "\n" * 10**6, "é" * 10**6]
    assert max(len(short_json(value)) for value in values) <= 2 * MAX_VALUE_CHARS + 3
    assert "\n" not in short_json("a\nb")
