"""Requests for replies of a certain form: the fields, their limits, and the grammars that reach the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import llguidance
import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from jamba_server.engine.grammar.limits import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_REGEX_CHARS
from jamba_server.engine.types import Request, TokenUpdate
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS
from jamba_server.server.http.schemas.chat import ChatCompletionRequest
from jamba_server.server.http.schemas.completions import CompletionRequest
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench, MakeBench, chat
from tests.server.fake_engine import EOS, Event, FakeEngine, updates_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}}
LARK = 'start: "a" | "b"'

FORMS: list[tuple[dict[str, Any], str, Any]] = [
    ({"response_format": {"type": "json_object"}}, "json_object", None),
    ({"response_format": NAMED}, "json_schema", SCHEMA),
    ({"structured_outputs": {"json_object": True}}, "json_object", None),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
    ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": True}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ("a", "b")),
    ({"structured_outputs": {"grammar": LARK}}, "lark", LARK),
    ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
    ({"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "xgrammar"}, "json_schema", SCHEMA),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a", "b"], "response_format": {"type": "text"}}, "choice", ("a", "b")),
    ({"guided_grammar": LARK, "structured_outputs": {"json_object": False}}, "lark", LARK),
]


@pytest.mark.parametrize(("fields", "kind", "value"), FORMS)
def test_a_form_is_read_from_each_field(fields: dict[str, Any], kind: str, value: Any) -> None:
    for body in (
        ChatCompletionRequest.model_validate(chat(**fields)),
        CompletionRequest.model_validate({"prompt": "a"} | fields),
    ):
        form = body.output_format
        assert form is not None
        assert (form.kind, form.value) == (kind, value)
        assert form.param.partition(".")[0] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"guided_json": None},
    ],
)
def test_text_is_no_form(fields: dict[str, Any]) -> None:
    assert CompletionRequest.model_validate({"prompt": "a"} | fields).output_format is None


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {}}, "response_format", "must be an object whose type is"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "must be an object whose type is"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
        "is required",
    ),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "must be a JSON schema"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
    ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json", "not JSON"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "is empty"),
    ({"structured_outputs": {"regex": "a" * (MAX_REGEX_CHARS + 1)}}, "structured_outputs.regex", "characters"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"choice": ["a"] * (MAX_CHOICES + 1)}}, "structured_outputs.choice", "items"),
    ({"structured_outputs": {"choice": ["a" * (MAX_CHOICE_CHARS + 1)]}}, "structured_outputs.choice.0", "characters"),
    ({"structured_outputs": {"grammar": "a" * (MAX_GRAMMAR_CHARS + 1)}}, "structured_outputs.grammar", "characters"),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs.grammar", "Lark"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex", "together with"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json", "together with `guided_regex`"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
    (
        {"response_format": NAMED, "guided_json": {}},
        "response_format.json_schema.schema",
        "together with `guided_json`",
    ),
    ({"guided_jsno": {}}, "guided_jsno", "did you mean `guided_json`?"),
    # The following errors come from the schema's check.
    ({"guided_json": {"properties": {"b": {"not": {}}}}}, "guided_json", "`not` at #/properties/b/not"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
        "response_format.json_schema.schema",
        "`uniqueItems` at #/uniqueItems",
    ),
    ({"guided_json": {"oneOf": [{}, {}]}}, "guided_json", "`oneOf` at #/oneOf"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "is refused"),
    ({"structured_outputs": {"grammar": "start: a"}}, "structured_outputs.grammar", "is refused"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_wrong_is_told_with_its_field(bench: Bench, path: str) -> None:
    body = chat() if path == CHAT else {"prompt": "a"}
    async with bench.http() as http:
        for fields, param, message in WRONG:
            response = await http.post(path, json=body | fields)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), fields
            assert message in error["message"]
            assert len(error["message"]) <= 1000
    assert bench.engine.requests == []


def test_numbers_have_their_limits_in_the_schema() -> None:
    schema = CompletionRequest.model_json_schema()["$defs"]["StructuredOutputs"]["properties"]
    assert schema["regex"]["anyOf"][0] == {"maxLength": MAX_REGEX_CHARS, "minLength": 1, "type": "string"}
    assert schema["choice"]["anyOf"][0]["maxItems"] == MAX_CHOICES


class City(BaseModel):
    """A type of a reply that the client defines."""

    model_config = ConfigDict(extra="forbid")

    name: str
    rivers: list[str]
    founded: int | None


class ConstrainedEngine(FakeEngine):
    """Replies at random, as far as the request's grammar allows, with a liking for what closes something."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(self._reply)
        self._closing = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ('"', "]", "}", "null")]
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=EOS)
        self._rng = np.random.default_rng(0)

    def _reply(self, request: Request) -> Iterable[Event]:
        matcher = llguidance.LLMatcher(self._tokenizer, request.params.grammar)
        assert not matcher.is_error(), matcher.get_error()
        token_ids: list[int] = []
        while not token_ids or token_ids[-1] != EOS:
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits = self._rng.gumbel(size=len(mask))
            logits[[*self._closing, EOS]] += 6
            token_ids.append(int(np.argmax(np.where(mask, logits, -np.inf))))
            assert matcher.consume_token(token_ids[-1])
        return updates_of(request, token_ids, "stop", EOS)


async def test_the_official_client_parses_the_reply(make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    bench = make_bench(engine=ConstrainedEngine(tokenizer))
    async with bench.openai() as client:
        for _ in range(5):
            reply = await client.chat.completions.parse(
                model="jamba", messages=[{"role": "user", "content": "Hi"}], response_format=City
            )
            assert isinstance(reply.choices[0].message.parsed, City)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_content_has_its_form(make_bench: MakeBench, tokenizer: Tokenizer, path: str) -> None:
    bench = make_bench(engine=ConstrainedEngine(tokenizer))
    choices = {"structured_outputs": {"choice": ["yes", "no, never"]}}
    bodies = [choices, {"guided_regex": "a[bc]{3}"}, {"guided_grammar": 'start: "x" "y"+'}, {"guided_json": SCHEMA}]
    async with bench.http() as http:
        texts: list[str] = []
        for fields in bodies:
            response = await http.post(path, json=(chat() if path == CHAT else {"prompt": ["a", "b"]}) | fields)
            assert response.status_code == 200, response.text
            for choice in response.json()["choices"]:
                texts.append(choice["message"]["content"] if path == CHAT else choice["text"])
    number = len(texts) // 4
    assert set(texts[:number]) <= {"yes", "no, never"}
    assert all(len(text) == 4 and text[0] == "a" and set(text[1:]) <= {"b", "c"} for text in texts[number : 2 * number])
    assert all(text[0] == "x" and set(text[1:]) == {"y"} for text in texts[2 * number : 3 * number])
    assert all(isinstance(json.loads(text)["a"], int) for text in texts[3 * number :])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"), [({"allowed_token_ids": [5]}, "allowed_token_ids"), ({"bad_words": ["a"]}, "bad_words")]
)
async def test_parameters_that_contradict_the_grammar_are_the_clients_error(
    bench: Bench, fields: dict[str, Any], param: str, stream: bool
) -> None:
    def script(request: Request) -> Iterable[Event]:
        yield TokenUpdate(request_id=request.id, finish_reason="error", error="They forbid it.", contradictory=True)

    bench.engine.script = script
    async with bench.http() as http:
        reply = await http.post(CHAT, json=chat(guided_choice=["a"], stream=stream, **fields))
    if stream:
        [event] = [line.removeprefix("data: ") for line in reply.text.splitlines() if '"error"' in line]
        error = json.loads(event)["error"]
    else:
        assert reply.status_code == 400
        error = reply.json()["error"]
    assert (error["type"], error["param"], error["message"]) == ("invalid_request_error", param, "They forbid it.")
