"""Requests at fault: each gets its status and OpenAI's error body, and none reaches the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from jamba_server.server.http.limits.bodies import BodyMemory
from jamba_server.server.http.middleware import (
    MAX_JSON_CONTAINERS,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    JsonBody,
    check_json,
)
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench, MakeBench, chat
from tests.server.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
MAX_BODY_BYTES = 100_000
USER = {"role": "user", "content": "Hi"}


def prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hi", **fields}


def turns(*messages: object) -> dict[str, Any]:
    return {"messages": list(messages)}


def part(kind: str) -> dict[str, Any]:
    return turns({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]})


def check(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 2000
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.fixture
def small(make_bench: MakeBench) -> Bench:
    return make_bench(max_body_bytes=MAX_BODY_BYTES)


# path, body, the field that is named, a part of the message
FIELDS: list[tuple[str, Any, str | None, str]] = [
    # shape
    (CHAT, [], None, "must be a JSON object"),
    (CHAT, "text", None, "must be a JSON object"),
    (CHAT, 3, None, "must be a JSON object"),
    (CHAT, {}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "Hi"}, "messages", "must be a list"),
    (CHAT, {"messages": None}, "messages", "must be a list"),
    (CHAT, turns("Hi"), "messages.0", "must be a JSON object"),
    # messages
    (CHAT, turns({"role": "user"}), "messages.0.content", "required"),
    (CHAT, turns({"content": "Hi"}), "messages.0.role", "required"),
    (CHAT, turns({"role": "robot", "content": "Hi"}), "messages.0.role", "'assistant'"),
    (CHAT, turns({"role": ["user"], "content": "Hi"}), "messages.0.role", "'assistant'"),
    (CHAT, turns(USER, {"role": "user", "content": 5}), "messages.1.content", "string or a list"),
    (CHAT, turns({"role": "user", "content": ["a"]}), "messages.0.content.0", "must be a JSON object"),
    (CHAT, part("image_url"), "messages.0.content.1", "only text"),
    (CHAT, part("input_audio"), "messages.0.content.1", "only text"),
    (CHAT, part("file"), "messages.0.content.1", "only text"),
    (CHAT, turns({"role": "user", "content": [{"type": "text"}]}), "messages.0.content.0.text", "required"),
    # numbers
    (CHAT, chat(temperature=2.1), "temperature", "at most 2"),
    (CHAT, chat(temperature=-0.1), "temperature", "at least 0"),
    (CHAT, chat(temperature="1"), "temperature", "must be a number"),
    (CHAT, chat(temperature=True), "temperature", "must be a number"),
    (CHAT, chat(temperature=10**400), "temperature", ""),
    (CHAT, chat(top_p=0), "top_p", "above 0"),
    (CHAT, chat(top_p=1.1), "top_p", "at most 1"),
    (CHAT, chat(top_k=-2), "top_k", "at least -1"),
    (CHAT, chat(min_p=2), "min_p", "at most 1"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty", "at least 0.01"),
    (CHAT, chat(presence_penalty=-2.5), "presence_penalty", "at least -2"),
    (CHAT, chat(frequency_penalty=3), "frequency_penalty", "at most 2"),
    (CHAT, chat(n=0), "n", "at least 1"),
    (CHAT, chat(n=129), "n", "at most 128"),
    (CHAT, chat(n=1.5), "n", "must be a whole number"),
    (CHAT, chat(n=True), "n", "must be a whole number"),
    (CHAT, chat(seed=2**63), "seed", "at most 9223372036854775807"),
    (CHAT, chat(max_tokens=0), "max_tokens", "at least 1"),
    (CHAT, chat(max_tokens=-2), "max_tokens", "is -2; it must be at least -1"),
    (CHAT, chat(max_completion_tokens=0), "max_completion_tokens", "at least 1"),
    (CHAT, chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "send one of them"),
    (CHAT, chat(min_tokens=-1), "min_tokens", "at least 0"),
    (CHAT, chat(min_tokens=6, max_tokens=5), "min_tokens", "must not exceed"),
    (CHAT, chat(top_logprobs=21, logprobs=True), "top_logprobs", "at most 20"),
    (CHAT, chat(top_logprobs=2), "top_logprobs", "`logprobs`: true"),
    (CHAT, chat(logprobs=5), "logprobs", "must be true or false"),
    # lists and maps
    (CHAT, chat(stop=""), "stop", "is empty"),
    (CHAT, chat(stop=["a", ""]), "stop.1", "is empty"),
    (CHAT, chat(stop=["a"] * 65), "stop", "has 65 items; at most 64"),
    (CHAT, chat(stop=5), "stop", "string or a list"),
    (CHAT, chat(bad_words="a"), "bad_words", "must be a list"),
    (CHAT, chat(bad_words=["a", " "]), "bad_words.1", "only spaces"),
    (CHAT, chat(bad_words=["a"] * 65), "bad_words", "at most 64"),
    (CHAT, chat(allowed_token_ids=[]), "allowed_token_ids", "has 0 items; it needs at least 1"),
    (CHAT, chat(allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids", str(VOCAB_SIZE)),
    (CHAT, chat(allowed_token_ids=[2], min_tokens=1), "allowed_token_ids", "leaves no token"),
    (CHAT, chat(cache_salt=""), "cache_salt", "is empty"),
    (CHAT, chat(cache_salt="x" * 129), "cache_salt", "has 129 characters; at most 128"),
    (CHAT, chat(stop_token_ids=["a"]), "stop_token_ids.0", "must be a whole number"),
    (CHAT, chat(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids", str(VOCAB_SIZE)),
    (CHAT, chat(stop_token_ids=[1] * 129), "stop_token_ids", "at most 128"),
    (CHAT, chat(logit_bias={"a": 1}), "logit_bias", "token id"),
    (CHAT, chat(logit_bias={"1": 101}), "logit_bias.1", "at most 100"),
    (CHAT, chat(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias", str(VOCAB_SIZE)),
    (CHAT, chat(logit_bias={str(i): 1 for i in range(301)}), "logit_bias", "at most 300"),
    (CHAT, chat(logit_bias=[1]), "logit_bias", "must be a JSON object"),
    # what goes together
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "`stream`: true"),
    (CHAT, chat(stream=False, stream_options={}), "stream_options", "`stream`: true"),
    (CHAT, chat(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_obfuscation", ""),
    (CHAT, chat(add_special_tokens=True), "add_special_tokens", ""),
    (CHAT, chat(priority=1), "priority", "--enable-priority"),
    # prompts
    (COMPLETIONS, {}, "prompt", "required"),
    (COMPLETIONS, {"prompt": None}, "prompt", "list of token ids"),
    (COMPLETIONS, {"prompt": {}}, "prompt", "list of token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "at least 1"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt.0", "at least 1"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1", "must be a whole number"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1", "must be a string"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt.0", "must be a whole number"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt.0", "at least 0"),
    (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
    (COMPLETIONS, prompt(prompt=["a"] * 1000, n=2), "n", "at most 1024"),
    (COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt", "at least one token"),
    (COMPLETIONS, prompt(max_tokens=0), "max_tokens", "`echo`"),
    (COMPLETIONS, prompt(logprobs=21), "logprobs", "at most 20"),
    (COMPLETIONS, prompt(logprobs=True), "logprobs", "must be a whole number"),
    (COMPLETIONS, prompt(best_of=2), "best_of", "not supported"),
    (COMPLETIONS, prompt(messages=[USER]), "messages", "field of /v1/chat/completions"),
    # text
    (TOKENIZE, {}, "prompt", "is required, unless `messages`"),
    (TOKENIZE, {"prompt": "a", "messages": [USER]}, "prompt", "send one of them"),
    (TOKENIZE, {"messages": [USER], "add_special_tokens": True}, "add_special_tokens", "chat template"),
    (TOKENIZE, {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt", "`messages`"),
    (DETOKENIZE, {"tokens": ["a"]}, "tokens.0", "must be a whole number"),
    (DETOKENIZE, {"tokens": [10**6]}, "tokens", "1000000"),
    (DETOKENIZE, {"tokens": [1] * (MAX_MODEL_LEN + 1)}, "tokens", f"context length is {MAX_MODEL_LEN}"),
    (TOKENIZE, {"prompt": "x" * 90_000}, "prompt", f"context length is {MAX_MODEL_LEN}"),
    (
        TOKENIZE,
        {"prompt": "x" * (MAX_MODEL_LEN + 1), "return_token_strs": True},
        "return_token_strs",
        f"context length is {MAX_MODEL_LEN}",
    ),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), FIELDS)
async def test_a_field_at_fault(small: Bench, path: str, body: Any, param: str | None, message: str) -> None:
    async with small.http() as http:
        error = check(await http.post(path, json=body), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert small.engine.requests == []


async def test_of_many_faults_a_few_are_told(bench: Bench) -> None:
    fields = {"temperature": 9, "top_p": 9, "n": 0, "seed": "a", "min_p": 9}
    async with bench.http() as http:
        error = check(await http.post(CHAT, json=chat(**fields)), 400)
    assert error["message"].endswith("; and 2 more.")
    assert error["message"].count("; ") == 6  # three sentences of two halves


NOT_YET = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {},
    "web_search_options": {},
    "moderation": {},
}


@pytest.mark.parametrize("name", NOT_YET)
async def test_what_comes_later_is_refused_by_name(bench: Bench, name: str) -> None:
    async with bench.http() as http:
        error = check(await http.post(CHAT, json=chat(**{name: NOT_YET[name]})), 400)
        assert (await http.post(CHAT, json=chat(**{name: None}))).status_code == 200
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert "is not supported yet" in error["message"]
    assert error["message"].count(name) == 1


async def test_results_of_openai_s_older_functions_are_refused(bench: Bench) -> None:
    async with bench.http() as http:
        error = check(await http.post(CHAT, json=turns({"role": "function", "content": "18C"})), 400)
    assert (error["param"], error["code"]) == ("messages.0.role", "unsupported_parameter")


async def test_suffix_comes_later(bench: Bench) -> None:
    async with bench.http() as http:
        error = check(await http.post(COMPLETIONS, json=prompt(suffix="x")), 400)
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")


def nested(depth: int) -> bytes:
    return b'{"messages": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


RAW: list[tuple[bytes, int, str | None, str]] = [
    (b"", 400, None, "required"),
    (b"null", 400, None, "must be a JSON object"),
    (b"{", 400, "invalid_json", "not valid JSON at position 1"),
    (b"{'messages': []}", 400, "invalid_json", "not valid JSON"),
    (b'{"messages": []} x', 400, "invalid_json", "not valid JSON"),
    (b'{"a": \xff}', 400, "invalid_json", "not valid UTF-8 at byte 6"),
    ('{"a": 1}'.encode("utf-16"), 400, "invalid_json", "UTF-8"),
    ('{"a": 1}'.encode("utf-16-le"), 400, "invalid_json", "zero bytes"),
    (json.dumps(chat(user="\ud800")).encode(), 400, "invalid_json", "UTF-16 surrogate pair"),
    (json.dumps({"\udc00": 1}).encode(), 400, "invalid_json", "UTF-16 surrogate pair"),
    (nested(MAX_JSON_DEPTH + 1), 400, "invalid_json", str(MAX_JSON_DEPTH)),
    (nested(40_000), 400, "invalid_json", str(MAX_JSON_DEPTH)),
    (nested(MAX_JSON_DEPTH), 400, None, "messages"),
    (b"[" + b"[]," * MAX_JSON_CONTAINERS + b"[]]", 400, "invalid_json", str(MAX_JSON_CONTAINERS)),
    (b'[[],[],"\\"' + b"[" * 100, 400, "invalid_json", "Unterminated string"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json", "limit of 4300"),
    (b'{"temperature": NaN, "messages": [{"role": "user", "content": "Hi"}]}', 400, None, "finite number"),
    (b'{"temperature": Infinity, "messages": [{"role": "user", "content": "Hi"}]}', 400, None, "finite number"),
    (b" " * (MAX_BODY_BYTES + 1), 413, "request_too_large", str(MAX_BODY_BYTES)),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), RAW)
async def test_a_body_at_fault(small: Bench, body: bytes, status: int, code: str | None, message: str) -> None:
    async with small.http(headers={"Content-Type": "application/json"}) as http:
        error = check(await http.post(CHAT, content=body), status)
    assert error["code"] == code
    assert message in error["message"]


async def test_a_body_in_chunks_is_cut_off_at_the_limit(small: Bench) -> None:
    read = 0

    async def chunks() -> AsyncGenerator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b" " * 1000

    async with small.http(headers={"Content-Type": "application/json"}) as http:
        check(await http.post(CHAT, content=chunks()), 413)
    assert read == MAX_BODY_BYTES // 1000 + 1


async def test_a_body_that_stops_in_the_middle() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("called")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{", "more_body": True} if parts.pop() else await never

    async def send(message: Message) -> None:
        raise AssertionError(message)

    parts, never = [False, True], asyncio.get_running_loop().create_future()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/a",
        "headers": [(b"content-type", b"application/json")],
        "app": Starlette(routes=[Route("/a", lambda request: Response(), methods=["POST"])]),
    }
    with pytest.raises(HTTPException, match=r"arrived for 0\.001 s") as caught:
        await JsonBody(app, max_bytes=10, memory=BodyMemory(10), body_timeout=0.001)(scope, receive, send)
    assert caught.value.status_code == 408


async def test_millions_of_ids_are_refused_before_they_are_parsed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(number: int) -> bytes:
        return b'{"tokens": [' + b"1," * (number - 1) + b"1]}"

    async with bench.http(headers={"Content-Type": "application/json"}) as http:
        error = check(await http.post(DETOKENIZE, content=ids(MAX_JSON_VALUES)), 400)
        assert error["code"] == "context_length_exceeded"
        with monkeypatch.context() as patch:
            patch.setattr(json, "loads", None)
            response = await http.post(DETOKENIZE, content=ids(2_000_000))
        error = check(response, 400)
        assert error["code"] == "invalid_json"
        assert str(MAX_JSON_VALUES) in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/decisions", "/v1/embeddings"])
async def test_numbers_with_thousands_of_digits_are_refused_by_name(bench: Bench, path: str) -> None:
    async with bench.http(headers={"Content-Type": "application/json"}) as http:
        error = check(await http.post(path, content=b'{"seed": ' + b"9" * 4301 + b"}"), 400)
    assert (error["code"], "4300" in error["message"]) == ("invalid_json", True)
    check_json(b'{"prompt": "' + b"9" * 5000 + b'"}')
    check_json(b"[" + (b"7" * 4300 + b",") * 900 + b"1]")


def test_commas_within_strings_are_text() -> None:
    check_json(b'{"prompt": "' + b"," * (MAX_JSON_VALUES + 1) + b'"}')


async def test_brackets_within_strings_are_text(small: Bench) -> None:
    text = '[{"\\' * 100
    async with small.http() as http:
        response = await http.post(CHAT, json=turns({"role": "user", "content": text}))
    # too long for the model, hence valid JSON
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_string_without_an_end_is_read_once() -> None:
    # with a second look from each of its quotes, this would take days
    check_json(b"[]," * MAX_JSON_DEPTH + b'"' + rb"\"" * 8_000_000)


async def test_pairs_of_surrogates_are_characters(bench: Bench) -> None:
    body = json.dumps(turns({"role": "user", "content": "😀"})).encode()
    assert rb"\ud83d" in body
    async with bench.http(headers={"Content-Type": "application/json"}) as http:
        assert (await http.post(CHAT, content=body)).status_code == 200


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_other_media_types(bench: Bench, media_type: str) -> None:
    async with bench.http(headers={"Content-Type": media_type}) as http:
        error = check(await http.post(CHAT, content=json.dumps(chat())), 415)
    assert error["code"] == "unsupported_media_type"


async def test_unknown_model(bench: Bench) -> None:
    async with bench.http() as http:
        error = check(await http.post(CHAT, json=chat(model="gpt-4")), 404)
        assert error == check(await http.post(COMPLETIONS, json=prompt(model="gpt-4")), 404) | {
            "request_id": error["request_id"]
        }
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "jamba, alias" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_prompt_that_leaves_no_token(bench: Bench, path: str) -> None:
    long = "x" * MAX_MODEL_LEN
    body = turns({"role": "user", "content": long}) if path == CHAT else {"prompt": long}
    async with bench.http() as http:
        error = check(await http.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert str(MAX_MODEL_LEN) in error["message"]


async def test_a_prompt_of_megabytes_is_not_even_tokenised(
    bench: Bench, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(tokenizer, "encode", encode)
    async with bench.http() as http:
        error = check(await http.post(COMPLETIONS, json={"prompt": "x" * 1_000_000}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert str(MAX_MODEL_LEN) in error["message"]


async def test_what_the_template_refuses(make_bench: MakeBench) -> None:
    bench = make_bench(template="{{ raise_exception('only one turn') }}")
    async with bench.http() as http:
        error = check(await http.post(CHAT, json=chat()), 400)
    assert "only one turn" in error["message"]


# fields that say nothing, as clients send them
NOTHING: dict[str, dict[str, Any]] = {
    "nulls": dict.fromkeys(("stop", "stream_options", "logprobs", "min_tokens", "ignore_eos", "skip_special_tokens")),
    "no tools": {"tools": [], "tool_choice": "none"},
    "no top_logprobs": {"logprobs": False, "top_logprobs": 0},
    "priority": {"priority": 0},
    "a reply sent back": turns(
        USER, {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": []}, USER
    ),
}


@pytest.mark.parametrize("name", NOTHING)
async def test_fields_that_say_nothing(bench: Bench, name: str) -> None:
    async with bench.http() as http:
        response = await http.post(CHAT, json=chat() | NOTHING[name])
    assert response.status_code == 200, response.text


ROUTES: list[tuple[str, str, str | None]] = [  # method, path, the methods that the path takes
    ("GET", CHAT, "POST"),
    ("PUT", CHAT, "POST"),
    ("DELETE", COMPLETIONS, "POST"),
    ("OPTIONS", TOKENIZE, "POST"),
    ("POST", "/", "GET, HEAD"),
    ("PATCH", "/v1/models/jamba", "GET, HEAD"),
    ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
    ("POST", "/v1/nothing", None),
    ("PUT", "/v1/chat", None),
    ("GET", "/docs/assets/nothing.js", None),
    ("GET", "/docs/assets/..%2f__init__.py", None),
]


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", ""])
@pytest.mark.parametrize(("method", "path", "allowed"), ROUTES)
async def test_unknown_routes(bench: Bench, method: str, path: str, allowed: str | None, media_type: str) -> None:
    async with bench.http() as http:
        response = await http.request(method, path, content=b"{", headers={"Content-Type": media_type})
    error = check(response, 405 if allowed else 404)
    assert f"There is no {method} /" in error["message"]
    assert error["code"] == ("method_not_allowed" if allowed else "not_found")
    assert response.headers.get("allow") == allowed
    assert f"this path takes {allowed}" in error["message"] if allowed else "/docs" in error["message"]
