"""What a chat template gets to read of a request for /v1/messages."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.schemas.messages.request import MessagesRequest
from jamba_server.server.http.schemas.messages.translate import Translated, translate
from tests.server.anthropic_api import message

MARK = {"cache_control": {"type": "ephemeral"}}
BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def translated(**fields: Any) -> Translated:
    return translate(MessagesRequest.model_validate(message(**fields)))


def test_system_blocks_become_one_system_message() -> None:
    assert translated(system="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}
    assert translated(system=[text("Be brief."), text("Be kind.")]).messages[0] == {
        "role": "system",
        "content": "Be brief.\nBe kind.",
    }
    assert [turn["role"] for turn in translated().messages] == ["user"]
    assert [turn["role"] for turn in translated(system=[]).messages] == ["user"]


@pytest.mark.parametrize(
    "system",
    [
        [text(BILLING), text("You are an agent.")],
        [text(f"{BILLING}\nYou are an agent.")],
        [text(f"\n{BILLING}\n\nYou are an agent.")],
        f"{BILLING}\nYou are an agent.",
    ],
)
def test_the_billing_line_is_not_read(system: Any) -> None:
    assert translated(system=system).messages[0] == {"role": "system", "content": "You are an agent."}


def test_a_billing_line_is_text_anywhere_else() -> None:
    found = translated(system=[text("Rules."), text(BILLING)], messages=[{"role": "user", "content": BILLING}])
    assert [turn["content"] for turn in found.messages] == [f"Rules.\n{BILLING}", BILLING]
    assert [turn["role"] for turn in translated(system=[text(BILLING)]).messages] == ["user"]


def test_tool_calls_and_results_become_messages_in_their_order() -> None:
    messages = [
        {"role": "user", "content": [text("Weather in"), text("Paris?")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need a tool.", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "xyz"},
                text("Let me "),
                text("look."),
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich", "days": [1]}},
                {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("18 °C"), text("dry")]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no clock", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_3"},
                text("Now answer."),
            ],
        },
        {"role": "system", "content": "The user is in a hurry."},
    ]
    found = translated(messages=messages)
    assert list(found.messages) == [
        {"role": "user", "content": "Weather in\nParis?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "I need a tool.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": [1]}'},
                },
                {"id": "toolu_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "18 °C\ndry"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no clock"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "Now answer."},
        {"role": "system", "content": "The user is in a hurry."},
    ]
    assert found.left_out == {"blocks of redacted thinking"}


def test_text_before_a_tool_result_stays_before_it() -> None:
    content = [text("First."), {"type": "tool_result", "tool_use_id": "t", "content": "r"}, text("Last.")]
    found = translated(messages=[{"role": "user", "content": content}])
    assert [turn["content"] for turn in found.messages] == ["First.", "r", "Last."]


def test_a_found_tool_is_read_by_its_name() -> None:
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [text("Found:"), {"type": "tool_reference", "tool_name": "WebFetch"}],
    }
    assert translated(messages=[{"role": "user", "content": [result]}]).messages[0]["content"] == "Found:\nWebFetch"


def test_marks_say_after_which_messages_to_save() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "r"}
    user: dict[str, Any] = {"role": "user", "content": [result, text("Go on.", **MARK)]}
    assert translated(messages=[user]).save_after == (1,)
    assert translated(system="S", messages=[user]).save_after == (2,)
    assert translated(system=[text("S", **MARK)], messages=[user]).save_after == (0, 2)
    assert translated(system="S", tools=[{**tool, **MARK}], messages=[user]).save_after == (0, 2)
    assert translated(messages=[{"role": "user", "content": [{**result, **MARK}, text("Go on.")]}]).save_after == (0,)
    nested = {**result, "content": [text("r", **MARK)]}
    assert translated(messages=[{"role": "user", "content": [nested, text("Go on.")]}]).save_after == (0,)
    reply = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}, **MARK}]}
    assert translated(messages=[{"role": "user", "content": "Hi"}, reply, user]).save_after == (1, 3)
    assert translated(system="S", **MARK).save_after == (1,)
    assert translated(system="S").save_after == ()


def test_more_than_four_marks_are_refused() -> None:
    marked = text("Hi", **MARK)
    assert translated(messages=[{"role": "user", "content": [marked] * 4}]).save_after == (0,)
    with pytest.raises(RequestRejected, match="5 `cache_control` marks; at most 4"):
        translated(messages=[{"role": "user", "content": [marked] * 4}], system=[marked])


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("user", {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
        ("user", {"type": "thinking", "thinking": "Hm.", "signature": ""}),
        ("assistant", {"type": "tool_result", "tool_use_id": "t"}),
        ("system", {"type": "tool_result", "tool_use_id": "t"}),
    ],
)
def test_blocks_that_a_role_cannot_have_are_refused(role: str, block: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"has a block of the type '{block['type']}'"):
        translated(messages=[{"role": role, "content": [block]}])
