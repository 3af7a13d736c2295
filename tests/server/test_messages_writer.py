"""The writer of /v1/messages: a stream, put together, is the reply without a stream, however the parts are cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import pytest
from pydantic_core import from_json

from jamba_server.engine.types import SamplingParams
from jamba_server.server.http.choice import ChoiceDelta, TextOptions
from jamba_server.server.http.generation import Generation, GenerationSpec, Prompt
from jamba_server.server.http.schemas.base import CompletionTokensDetails, PromptTokensDetails, Usage
from jamba_server.server.http.schemas.cache_report import JambaCache
from jamba_server.server.http.schemas.messages.reply import ReplyThinking
from jamba_server.server.http.writers.messages import MessagesWriter, arguments_of
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall, join
from tests.server.anthropic_api import checked_events, checked_message

NUM_PROMPT, NUM_CACHED, NUM_GENERATED, NUM_REASONING = 100, 40, 7, 3


@dataclass
class Finished:
    """What the writer reads of a generation."""

    spec: GenerationSpec
    usage: Usage
    cache: JambaCache | None = None


def writer(
    *, max_tokens: int = 50, clamped: int | None = None, num_saved: int = 0, shows: bool = True
) -> MessagesWriter:
    params = SamplingParams(max_tokens=max_tokens if clamped is None else clamped)
    spec = GenerationSpec(id="msg_1", prompts=(Prompt([5] * NUM_PROMPT, params),), n=1, text=TextOptions())
    usage = Usage(
        prompt_tokens=NUM_PROMPT,
        completion_tokens=NUM_GENERATED,
        total_tokens=NUM_PROMPT + NUM_GENERATED,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=NUM_CACHED),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=NUM_REASONING),
    )
    return MessagesWriter(
        generation=cast(Generation, Finished(spec, usage)),
        model="jamba",
        max_tokens=max_tokens,
        num_saved=num_saved,
        shows_thinking=shows,
    )


def pieces(part: Part) -> list[Part]:
    """The part, one character at a time."""
    match part:
        case Text(text):
            return [Text(char) for char in text]
        case Reasoning(text):
            return [Reasoning(char) for char in text]
        case ToolCall(index, id_, name, arguments):
            return [ToolCall(index, id_, name, ""), *(ToolCall(index, "", "", char) for char in arguments)]


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of the events."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    message, open_block, arguments = events[0]["message"], None, ""
    for event in events[2:]:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                assert event["index"] == len(message["content"])
                open_block, arguments = event["content_block"], ""
                message["content"].append(open_block)
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                assert open_block is not None
                delta = dict(event["delta"])
                kind = delta.pop("type")
                [(key, value)] = delta.items()
                if kind == "input_json_delta":
                    arguments += value
                    open_block["input"] = from_json(arguments, allow_partial=True) if arguments else {}
                else:
                    open_block[key] += value
            case "content_block_stop":
                assert event["index"] == len(message["content"]) - 1
                open_block = None
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
            case last:
                assert last == "message_stop"
                assert event is events[-1]
    return message


def streamed(made: MessagesWriter, deltas: list[ChoiceDelta]) -> list[dict[str, Any]]:
    sent = [*made.begin(), *(event for delta in deltas for event in made.write(delta)), *made.end()]
    return checked_events(b"".join(sent))


CALL = ToolCall(0, "call_a", "weather", '{"city": "Zürich", "days": [1, 2], "note": "a \\"b\\""}')
REPLIES: dict[str, tuple[Part, ...]] = {
    "nothing": (),
    "text": (Text("Hello the 😀 world"),),
    "empty pieces": (Text(""), Text("a"), Text(""), Reasoning("")),
    "reasoning": (Reasoning("I think.\nSo I am."), Text("Yes.")),
    "call": (CALL,),
    "calls": (Text("Let me look."), CALL, ToolCall(1, "call_b", "time", "{}"), Text("Wait.")),
    "call without arguments": (ToolCall(0, "call_a", "time", ""),),
    "everything": (
        Reasoning("Hm."),
        Text("First "),
        Text("this."),
        CALL,
        Text("Then"),
        Reasoning("Hm?"),
        Text("that."),
    ),
    "cut call": (ToolCall(0, "call_a", "weather", '{"city": "Paris", "days": [1, 2'),),
    "cut string": (ToolCall(0, "call_a", "weather", '{"city": "Paris", "note": "half'),),
}


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("shows", [True, False])
def test_a_stream_put_together_is_the_reply(name: str, shows: bool) -> None:
    parts = REPLIES[name]
    whole = [ChoiceDelta(index=0, parts=parts, finish_reason="stop")]
    made = writer(shows=shows).reply([ChoiceDelta(index=0, parts=join(parts), finish_reason="stop")])
    reply = checked_message(json.loads(made.model_dump_json()))
    cut = [ChoiceDelta(index=0, parts=(piece,)) for part in parts for piece in pieces(part)]
    end = ChoiceDelta(index=0, finish_reason="stop")
    for deltas in (whole, [*cut, end]):
        assert put_together(streamed(writer(shows=shows), deltas)) == reply


def test_blocks_have_the_parts_in_their_order() -> None:
    parts = REPLIES["everything"]
    made = writer().reply([ChoiceDelta(index=0, parts=join(parts), finish_reason="tool_calls")])
    content = json.loads(made.model_dump_json())["content"]
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "text", "thinking", "text"]
    assert content[0]["thinking"] == "Hm." and content[0]["signature"]
    assert content[1]["text"] == "First this."
    assert content[2] | {"type": "tool_use"} == {
        "type": "tool_use",
        "id": "call_a",
        "name": "weather",
        "input": {"city": "Zürich", "days": [1, 2], "note": 'a "b"'},
    }


def test_omitted_reasoning_still_has_a_signature() -> None:
    shown, hidden = (
        writer(shows=shows).reply([ChoiceDelta(index=0, parts=(Reasoning("Hm."),), finish_reason="stop")]).content[0]
        for shows in (True, False)
    )
    assert isinstance(shown, ReplyThinking) and isinstance(hidden, ReplyThinking)
    assert (shown.thinking, hidden.thinking) == ("Hm.", "")
    assert shown.signature == hidden.signature


@pytest.mark.parametrize(
    ("finish", "stop", "clamped", "expected"),
    [
        ("stop", None, None, ("end_turn", None)),
        ("stop", 7, None, ("end_turn", None)),
        ("stop", "END", None, ("stop_sequence", "END")),
        ("length", None, None, ("max_tokens", None)),
        ("length", None, 20, ("model_context_window_exceeded", None)),
        ("tool_calls", None, None, ("tool_use", None)),
    ],
)
def test_stop_reasons(
    finish: Any, stop: str | int | None, clamped: int | None, expected: tuple[str, str | None]
) -> None:
    delta = ChoiceDelta(index=0, parts=(Text("x"),), finish_reason=finish, stop_reason=stop)
    reply = writer(clamped=clamped).reply([delta])
    assert (reply.stop_reason, reply.stop_sequence) == expected
    event = streamed(writer(clamped=clamped), [delta])[-2]
    assert (event["delta"]["stop_reason"], event["delta"]["stop_sequence"]) == expected


@pytest.mark.parametrize(("num_saved", "created"), [(0, 0), (30, 0), (40, 0), (41, 1), (100, 60)])
def test_the_three_counts_of_the_prompt_add_up(num_saved: int, created: int) -> None:
    delta = ChoiceDelta(index=0, parts=(Text("x"),), finish_reason="stop")
    usage = writer(num_saved=num_saved).reply([delta]).usage.model_dump()
    assert usage == {
        "input_tokens": NUM_PROMPT - NUM_CACHED - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": NUM_CACHED,
        "output_tokens": NUM_GENERATED,
        "output_tokens_details": {"thinking_tokens": NUM_REASONING},
    }
    events = streamed(writer(num_saved=num_saved), [delta])
    assert events[0]["message"]["usage"] == events[-2]["usage"] == usage


def test_an_error_is_one_event() -> None:
    [event] = writer().fail(b'{"type":"error","error":{"type":"api_error","message":"No."},"request_id":"r"}')
    assert checked_events(event)[0]["error"]["message"] == "No."


@pytest.mark.parametrize("text", ['{"a": ' * 300 + "1" + "}" * 300, '{"a": ' + "9" * 5000 + "}"])
def test_arguments_that_python_cannot_read_are_not_lost(text: str) -> None:
    assert arguments_of(text) == {"unreadable": text}
    assert arguments_of('{"a": 1, "b": "x') == {"a": 1}
