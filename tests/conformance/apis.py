"""Runs a request through the official clients, streamed or not, and puts a stream together to one reply."""

from __future__ import annotations

import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
from anthropic.types import Message, RawMessageStreamEvent
from fastapi import FastAPI
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from tests.conformance.rows import Body
from tests.conformance.strict import check

Json = dict[str, Any]


@dataclass
class Answer:
    """A reply as JSON, or the reply that a stream's events make, and its headers."""

    reply: Json
    headers: httpx.Headers


class Api(ABC):
    """An endpoint that generates text, through a client that calls the application without a socket.

    `count_path` is an endpoint that tells the number of tokens of the same request's prompt in its field `counted`.
    """

    path: str
    example: ClassVar[Body]
    count_path: str
    counted: str

    def __init__(self, app: FastAPI) -> None:
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")

    @abstractmethod
    async def call(self, body: Body) -> Answer: ...

    @abstractmethod
    async def stream(self, body: Body) -> Answer: ...

    def same(self, reply: Json) -> Json:
        """Returns a reply without what differs from request to request: ids and times."""
        return _without(reply, {"id", "created", "created_at", "completed_at", "call_id", "item_id", "signature"})


class OpenAIApi(Api):
    def __init__(self, app: FastAPI) -> None:
        super().__init__(app)
        http: Any = self.http  # the client's types name a fork of httpx, but the client takes both
        self.client = AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=http, max_retries=0)


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: set(item) if key == "timings" and item else _without(item, names)
            for key, item in value.items()
            if key not in names
        }
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _arguments(method: Callable[..., Any], body: Body) -> Json:
    """Splits a body into the parameters that the client's method knows and the others."""
    known = inspect.signature(method).parameters
    others = {name: value for name, value in body.items() if name not in known}
    return {name: value for name, value in body.items() if name in known} | {"extra_body": others}


def _text(events: Iterable[Any]) -> list[str]:
    return [event.to_json(indent=None, exclude_unset=True) for event in events]


class ChatApi(OpenAIApi):
    path = "/v1/chat/completions"
    example: ClassVar[Body] = {"model": "jamba", "messages": [{"role": "user", "content": "Hi"}]}
    count_path, counted = "/v1/chat/completions/render", "count"

    async def call(self, body: Body) -> Answer:
        create = self.client.chat.completions.with_raw_response.create
        raw = await create(**_arguments(self.client.chat.completions.create, body))
        check(ChatCompletion, raw.text)
        return Answer(json.loads(raw.text), raw.headers)

    async def stream(self, body: Body) -> Answer:
        body = {"stream_options": {"include_usage": True}, **body, "stream": True}
        create = self.client.chat.completions.with_raw_response.create
        raw = await create(**_arguments(self.client.chat.completions.create, body))
        texts = _text([event async for event in raw.parse()])
        for text in texts:
            check(ChatCompletionChunk, text)
        events = [json.loads(text) for text in texts]
        return Answer(_one_chat(events), raw.headers)


def _one_chat(events: list[Json]) -> Json:
    reply: Json = {key: events[0][key] for key in ("id", "created", "model")} | {"object": "chat.completion"}
    choices: dict[int, Json] = {}
    for event in events:
        for name in ("prompt_token_ids", "timings", "usage"):
            if name == "usage" and event["choices"] and event.get("usage"):
                reply["usages"] = reply.get("usages", 0) + 1
            if event.get(name) is not None:
                reply[name] = event[name]
        for delta in event["choices"]:
            _add_delta(choices.setdefault(delta["index"], _new_choice(delta["index"])), delta)
    for choice in choices.values():
        message = choice["message"]
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
    return reply | {"choices": [choices[index] for index in sorted(choices)]}


def _new_choice(index: int) -> Json:
    message = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None, "stop_reason": None}


def _add_delta(choice: Json, event: Json) -> None:
    assert choice["finish_reason"] is None, "nothing comes after the finish reason"
    message, delta = choice["message"], event["delta"]
    for name in ("content", "reasoning", "reasoning_content"):
        if name in delta:
            message[name] = message.get(name, "") + delta[name]
    for piece in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if piece["index"] == len(calls):
            calls.append({"id": piece["id"], "type": piece["type"], "function": {**piece["function"]}})
        else:
            assert piece["index"] == len(calls) - 1
            calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    if event.get("logprobs") is not None:
        choice["logprobs"] = {"content": ((choice["logprobs"] or {}).get("content", [])) + event["logprobs"]["content"]}
    if "token_ids" in event:
        choice["token_ids"] = choice.get("token_ids", []) + event["token_ids"]
    choice["finish_reason"], choice["stop_reason"] = event["finish_reason"], event["stop_reason"]


class CompletionApi(OpenAIApi):
    path = "/v1/completions"
    example: ClassVar[Body] = {"model": "jamba", "prompt": "Hi"}
    count_path, counted = "", ""

    async def call(self, body: Body) -> Answer:
        raw = await self.client.completions.with_raw_response.create(**_arguments(self.client.completions.create, body))
        check(Completion, _without_nulls(raw.text))
        return Answer(json.loads(raw.text), raw.headers)

    async def stream(self, body: Body) -> Answer:
        body = {"stream_options": {"include_usage": True}, **body, "stream": True}
        raw = await self.client.completions.with_raw_response.create(**_arguments(self.client.completions.create, body))
        texts = _text([event async for event in raw.parse()])
        for text in texts:
            check(Completion, _without_nulls(text))
        events = [json.loads(text) for text in texts]
        return Answer(_one_completion(events), raw.headers)


def _without_nulls(text: str) -> str:
    """OpenAI's class lacks nulls that OpenAI's own replies have: in place of the finish reason of an event, and of the
    log-probability of the first token of an echoed prompt."""
    text = text.replace('"finish_reason":null', '"finish_reason":"stop"')
    return text.replace('_logprobs":[null', '_logprobs":[0').replace('"top_logprobs":[0', '"top_logprobs":[{}')


def _one_completion(events: list[Json]) -> Json:
    reply: Json = {key: events[0][key] for key in ("id", "created", "model", "object")}
    choices: dict[int, Json] = {}
    for event in events:
        for name in ("timings", "usage"):
            if name == "usage" and event["choices"] and event.get("usage"):
                reply["usages"] = reply.get("usages", 0) + 1
            if event.get(name) is not None:
                reply[name] = event[name]
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"index": piece["index"], "text": "", "logprobs": None})
            choice["text"] += piece["text"]
            choice |= {name: piece[name] for name in ("finish_reason", "stop_reason")}
            if piece["logprobs"] is not None:
                old = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {name: old[name] + items for name, items in piece["logprobs"].items()}
            for name in ("token_ids", "prompt_token_ids"):
                if name in piece:
                    choice[name] = choice.get(name, []) + piece[name]
    return reply | {"choices": [choices[index] for index in sorted(choices)]}


class ResponseApi(OpenAIApi):
    path = "/v1/responses"
    example: ClassVar[Body] = {"model": "jamba", "input": "Hi"}
    count_path, counted = "/v1/responses/input_tokens", "input_tokens"

    async def call(self, body: Body) -> Answer:
        raw = await self.client.responses.with_raw_response.create(**_arguments(self.client.responses.create, body))
        check(Response, raw.text)
        return Answer(json.loads(raw.text), raw.headers)

    async def stream(self, body: Body) -> Answer:
        body = {**body, "stream": True}
        raw = await self.client.responses.with_raw_response.create(**_arguments(self.client.responses.create, body))
        texts = _text([event async for event in raw.parse()])
        for text in texts:
            check(ResponseStreamEvent, text)
        events = [json.loads(text) for text in texts]
        return Answer(_one_response(events), raw.headers)


def _one_response(events: list[Json]) -> Json:
    """Checks that the events tell the same as the response at their end, and returns it."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    response = events[-1]["response"]
    assert events[-1]["type"] == f"response.{response['status']}"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == response["output"]
    texts: dict[tuple[str, int, str], str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            key = (event["item_id"], event.get("content_index", 0), event["type"])
            texts[key] = texts.get(key, "") + event["delta"]
    told = [(part["text"]) for item in done for part in item.get("content", ())]
    told += [item["arguments"] for item in done if item["type"] == "function_call"]
    assert sorted(texts.values()) == sorted(text for text in told if text)
    return response


def _anthropic_transport(app: FastAPI) -> Any:
    """Newer versions of Anthropic's client use a fork of httpx, which has its own transports."""
    library = sys.modules[DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]]
    return library.ASGITransport(app)


class MessageApi(Api):
    path = "/v1/messages"
    example: ClassVar[Body] = {"model": "jamba", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}
    count_path, counted = "/v1/messages/count_tokens", "input_tokens"

    def __init__(self, app: FastAPI) -> None:
        super().__init__(app)
        http = DefaultAsyncHttpxClient(transport=_anthropic_transport(app))
        self.client = AsyncAnthropic(base_url="http://server", api_key="none", http_client=http, max_retries=0)

    async def call(self, body: Body) -> Answer:
        raw = await self.client.messages.with_raw_response.create(**_arguments(self.client.messages.create, body))
        text = raw.text if isinstance(raw.text, str) else await raw.text()
        check(Message, text)
        return Answer(json.loads(text), raw.headers)

    async def stream(self, body: Body) -> Answer:
        body = {**body, "stream": True}
        raw = await self.client.messages.with_raw_response.create(**_arguments(self.client.messages.create, body))
        texts = _text([event async for event in await raw.parse()])
        for text in texts:
            check(RawMessageStreamEvent, text)
        events = [json.loads(text) for text in texts]
        return Answer(_one_message(events), raw.headers)


def _one_message(events: list[Json]) -> Json:
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    message: Json = {**events[0]["message"], "content": []}
    blocks: list[Json] = message["content"]
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "_json": ""})
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                _add_to_block(blocks[-1], event["delta"])
            case "content_block_stop":
                text = blocks[-1].pop("_json")
                if blocks[-1]["type"] == "tool_use":
                    blocks[-1]["input"] = json.loads(text or "{}")
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
            case _:
                pass
    return message


def _add_to_block(block: Json, delta: Json) -> None:
    match delta:
        case {"type": "text_delta", "text": text}:
            block["text"] += text
        case {"type": "thinking_delta", "thinking": text}:
            block["thinking"] += text
        case {"type": "signature_delta", "signature": text}:
            block["signature"] += text
        case {"type": "input_json_delta", "partial_json": text}:
            block["_json"] += text
        case _:
            raise AssertionError(delta)
