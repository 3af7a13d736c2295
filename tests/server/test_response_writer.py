"""How the parts of a reply become output items and events of a response."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.generation import Generation
from jamba_server.server.http.schemas.base import CompletionTokensDetails, FinishReason, PromptTokensDetails, Usage
from jamba_server.server.http.schemas.responses.items import decode_reasoning
from jamba_server.server.http.schemas.responses.reply import Response
from jamba_server.server.http.schemas.responses.tools import FunctionNames, FunctionTool, NamespaceTool
from jamba_server.server.http.writers.responses import ResponseOptions, ResponseWriter
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall
from jamba_server.server.text.tokenizer import Tokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USAGE = Usage(
    prompt_tokens=7,
    completion_tokens=5,
    total_tokens=12,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=4),
    completion_tokens_details=CompletionTokensDetails(reasoning_tokens=2),
)
BEGUN = Response(
    id="resp_1", created_at=1, status="in_progress", instructions=None, max_output_tokens=None, max_tool_calls=None,
    metadata={}, model="jamba", parallel_tool_calls=True, previous_response_id=None, prompt_cache_key=None,
    reasoning={}, safety_identifier=None, store=False, temperature=1, text={"format": {"type": "text"}},
    tool_choice="auto", tools=[], top_logprobs=0, top_p=1, truncation="disabled", user=None,
)  # fmt: skip


class UsageOnly:
    """What the writer needs of a generation."""

    usage = USAGE
    cache = None


def make(tokenizer: Tokenizer, *, logprobs: bool = False, encoded: bool = False) -> ResponseWriter:
    function = FunctionTool(type="function", name="find")
    names = FunctionNames.of(
        [FunctionTool(type="function", name="f"), NamespaceTool(type="namespace", name="crm", tools=[function])]
    )
    options = ResponseOptions(names=names, with_logprobs=logprobs, with_encoded_reasoning=encoded, caches=True)
    return ResponseWriter(cast(Generation, UsageOnly()), tokenizer, BEGUN, options, None)


def run(writer: ResponseWriter, *deltas: ChoiceDelta) -> list[dict[str, Any]]:
    """The events from the first delta on. Each is one of OpenAI's to the letter."""
    for _ in writer.begin():
        pass
    blocks = [block for delta in deltas for block in writer.write(delta)]
    blocks += writer.end()
    events: list[dict[str, Any]] = []
    for block in blocks:
        data = block.decode().split("\ndata: ")[1]
        EVENT.validate_json(data, strict=True)
        events.append(json.loads(data))
    assert [event["sequence_number"] for event in events] == [number + 2 for number in range(len(events))]
    return events


def parts(*parts: Part, finish: FinishReason | None = None) -> ChoiceDelta:
    return ChoiceDelta(index=0, parts=parts, finish_reason=finish)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_reasoning_text_and_calls_are_items_of_their_own(tokenizer: Tokenizer) -> None:
    events = run(
        make(tokenizer),
        parts(Reasoning("I ")),
        parts(Reasoning("think."), Text("So")),
        parts(Text("!"), ToolCall(0, "call_1", "f", '{"a"'), ToolCall(0, "", "", ":1}")),
        parts(ToolCall(1, "call_2", "crm__find", "{}")),
        parts(finish="stop"),
    )
    reasoning = [
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    text = ["content_part.added", "output_text.delta", "output_text.delta", "output_text.done", "content_part.done"]
    call = ["function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done"]
    expected: list[str] = []
    for inner in (reasoning, text, call, call[1:]):
        expected += ["output_item.added", *inner, "output_item.done"]
    assert kinds(events) == [*expected, "completed"]
    output = events[-1]["response"]["output"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["item"] for event in done] == output
    assert [event["item"]["id"] for event in added] == [item["id"] for item in output]
    assert [event["output_index"] for event in added] == [0, 1, 2, 3]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == output[event["output_index"]]["id"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "I think."}]
    assert output[0]["encrypted_content"] is None
    assert output[1]["content"][0]["text"] == "So!"
    calls = [(c["call_id"], c["namespace"], c["name"], c["arguments"], c["status"]) for c in output[2:]]
    assert calls == [("call_1", None, "f", '{"a":1}', "completed"), ("call_2", "crm", "find", "{}", "completed")]


def test_the_reasoning_is_encoded_on_request(tokenizer: Tokenizer) -> None:
    events = run(make(tokenizer, encoded=True), parts(Reasoning("Ünïcode")), parts(Text("a"), finish="stop"))
    item = events[-1]["response"]["output"][0]
    assert decode_reasoning(item["encrypted_content"]) == "Ünïcode"


@pytest.mark.parametrize("text", ["something else", "jamba-reasoning:%%%", "jamba-reasoning:/w=="])
def test_what_another_server_has_encrypted_is_not_read(text: str) -> None:
    assert decode_reasoning(text) is None


def test_white_space_around_calls_is_no_message(tokenizer: Tokenizer) -> None:
    events = run(
        make(tokenizer),
        parts(Text("\n"), ToolCall(0, "call_1", "f", "{}")),
        parts(Text("\n"), ToolCall(1, "call_2", "f", "{}"), Text(" \n"), finish="stop"),
    )
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["function_call", "function_call"]


def test_white_space_before_a_text_belongs_to_it(tokenizer: Tokenizer) -> None:
    events = run(
        make(tokenizer), parts(Text("\n")), parts(Text(" ")), parts(Text("a")), parts(Text("\n"), finish="stop")
    )
    [message] = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == "\n a\n"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas == ["\n a", "\n"]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_reply_without_an_item_gets_a_message(tokenizer: Tokenizer, text: str) -> None:
    events = run(make(tokenizer), parts(Text(text), finish="stop"))
    [message] = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == text


def test_the_last_item_of_a_reply_that_was_cut_is_incomplete(tokenizer: Tokenizer) -> None:
    events = run(make(tokenizer), parts(Text("a"), ToolCall(0, "call_1", "f", '{"a"')), parts(finish="length"))
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["completed_at"] is None


def test_a_failure_keeps_what_was_written(tokenizer: Tokenizer) -> None:
    writer = make(tokenizer)
    list(writer.write(parts(Reasoning("Hm"), Text("a"))))
    error = {"error": {"message": "It died.", "type": "server_error", "param": None, "code": None, "request_id": "r"}}
    [block] = writer.fail(json.dumps(error).encode())
    data = block.decode().split("\ndata: ")[1]
    EVENT.validate_json(data, strict=True)
    response = json.loads(data)["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "It died."})
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]
    assert response["usage"]["output_tokens"] == USAGE.completion_tokens
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


def test_only_the_tokens_of_the_text_have_logprobs(tokenizer: Tokenizer) -> None:
    def scored(token_id: int, *new: Part, finish: FinishReason | None = None) -> ChoiceDelta:
        score = TokenScore(token_id, -0.5, (), 0)
        return ChoiceDelta(index=0, parts=new, scores=(score,), finish_reason=finish)

    events = run(
        make(tokenizer, logprobs=True),
        scored(1600, Reasoning("a")),
        scored(1601, Text("b")),
        scored(1602, ToolCall(0, "call_1", "f", "{}")),
        scored(2, finish="stop"),
    )
    message = events[-1]["response"]["output"][1]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == [tokenizer.token_text(1601)]
