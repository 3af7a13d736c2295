"""Rows of /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from tests.conformance import shared_rows
from tests.conformance.rows import DIFFERS, Inert, Refused, Row, contains, params, some
from tests.server.served_model import HERMES_CALL, JAMBA_CALL, PARIS, WEATHER

USER = {"role": "user", "content": "Hi"}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "clock"}}]
_FIRST = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
TWO_CALLS = f' <tool_calls>[{_FIRST}, {{"name": "clock", "arguments": {{}}}}]</tool_calls>'
CONTENT = "choices.0.message.content"
THOUGHTS = "I think\n</think>\n\nhello"
CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def _with_name(**fields: Any) -> dict[str, Any]:
    """The declaration of one function, with fields that differ from row to row."""
    return {"tools": [{"type": "function", "function": {"name": "clock", **fields}}]}


def _history(message: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, message, USER]}


def _called(**changes: Any) -> dict[str, Any]:
    call = {**CALL, **{name: value for name, value in changes.items() if name in CALL}}
    call["function"] = {**CALL["function"], **changes.get("function", {})}  # type: ignore[dict-item]
    return _history({"role": "assistant", "content": None, "tool_calls": [call]})


def _choice(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


_CALLED_NAME = "choices.0.message.tool_calls.0.function.name"

MESSAGE_ROWS = [
    Row(field="messages.role", body={"messages": [{"role": "system", "content": "Hi"}, USER]}, prompt="<|system|> Hi"),
    Row(
        field="messages.role",
        body={"messages": [{"role": "developer", "content": "Hi"}, USER]},
        prompt="<|system|> Hi",
    ),
    Row(field="messages.content", body={"messages": [{"role": "user", "content": "Who?"}]}, prompt="<|user|> Who?"),
    Row(
        field="messages.content.text",
        base={"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        body={"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
        prompt="<|user|> a\nb",
    ),
    Row(field="messages.name", body={"messages": [{**USER, "name": "Ann"}]}, prompt="(Ann)Hi"),
    Row(
        field="messages.tool_call_id",
        base={"messages": [USER, {"role": "tool", "content": "18C"}]},
        body={"messages": [USER, {"role": "tool", "content": "18C", "tool_call_id": "call_1"}]},
        prompt="<|tool|> [call_1]18C",
    ),
    Row(field="messages.tool_calls.id", base=_called(), body=_called(id="call_2"), prompt="[call_2 clock {}]"),
    Row(
        field="messages.tool_calls.function.name",
        base=_called(),
        body=_called(function={"name": "watch"}),
        prompt="[call_1 watch {}]",
    ),
    Row(
        field="messages.tool_calls.function.arguments",
        base=_called(),
        body=_called(function={"arguments": PARIS}),
        prompt="clock " + PARIS,
    ),
    *(
        Row(
            field=f"messages.{name}",
            base=_history({"role": "assistant", "content": "Yes"}),
            body=_history({"role": "assistant", "content": "Yes", name: "because"}),
            prompt="{because}Yes",
        )
        for name in ("reasoning", "reasoning_content")
    ),
]
INERT_MESSAGES = [
    Inert(
        "messages.tool_calls.index",
        _history({"role": "assistant", "tool_calls": [{**CALL, "index": 0}]}),
        _called(),
    ),
    Inert(
        "messages.annotations",
        _history({"role": "assistant", "content": "Yes", "annotations": [{"type": "url_citation"}]}),
        _history({"role": "assistant", "content": "Yes"}),
    ),
]
REFUSED_MESSAGES = [
    Refused(
        "messages.content.type",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "messages.0.content.0",
    ),
    Refused("messages.tool_calls.type", _called(type="custom"), "messages.1.tool_calls.0.type"),
    *(
        Refused(
            f"messages.{name}", {"messages": [{"role": "assistant", "content": "", name: value}]}, f"messages.0.{name}"
        )
        for name, value in {"refusal": "No.", "audio": {"id": "a"}, "function_call": {"name": "f"}}.items()
    ),
]
# The fields that reach the chat template. /tokenize has them too.
TEMPLATE_ROWS = [
    Row(
        field="tools.function.name",
        base=_with_name(),
        body={"tools": [{"type": "function", "function": {"name": "spotify.play"}}]},
        prompt='"name": "spotify.play"',
    ),
    Row(field="tools.function.description", base=_with_name(), body=_with_name(description="Time"), prompt="Time"),
    Row(
        field="tools.function.parameters",
        base=_with_name(),
        body=_with_name(parameters={"type": "object", "properties": {"zone": {"type": "string"}}}),
        prompt="zone",
    ),
    Row(
        field="tools.type",
        base={"tools": [WEATHER]},
        body={"tools": [{"type": "custom", "name": "a"}]},
        headers={"x-warning": contains("custom")},
    ),
    Row(field="reasoning_effort", body={"reasoning_effort": "high"}, prompt="effort:high"),
    Row(field="reasoning_effort", body={"reasoning_effort": "none"}, prompt="<think>\n\n</think>", model="reasoning"),
    Row(field="documents", body={"documents": [{"title": "T", "text": "D"}]}, prompt="<documents>T:D</documents>"),
    Row(field="chat_template", body={"chat_template": "Only {{ messages[0].content }}"}, prompt="Only Hi"),
    Row(field="chat_template_kwargs", body={"chat_template_kwargs": {"style": "brief"}}, prompt="brief"),
    Row(
        field="add_generation_prompt",
        base={"messages": [{"role": "user", "content": ""}]},
        body={"messages": [{"role": "user", "content": ""}], "add_generation_prompt": False},
        engine={"0.prompt.-1": 518},  # <|eom|>, in place of <|assistant|>
    ),
    Row(
        field="continue_final_message",
        base={"messages": [USER, {"role": "assistant", "content": "Well"}]},
        body={"continue_final_message": True},
        engine={"0.prompt.-1": lambda token: token not in (518, 522)},
    ),
]
ROWS = [
    *shared_rows.sampling_rows(CONTENT),
    *shared_rows.FORM_ROWS,
    *shared_rows.RESPONSE_FORMAT_ROWS,
    *shared_rows.STREAM_ROWS,
    *shared_rows.LENGTH_ROWS,
    *shared_rows.DETAIL_ROWS,
    *MESSAGE_ROWS,
    *TEMPLATE_ROWS,
    Row(
        field="prompt_logprobs",
        body={"prompt_logprobs": 1},
        engine=params(prompt_logprobs=1),
        reply={"prompt_logprobs": some},
        streamed=False,
    ),
    Row(field="logprobs", body={"logprobs": True}, reply={"choices.0.logprobs.content": some}),
    Row(
        field="top_logprobs",
        base={"logprobs": True},
        body={"top_logprobs": 2},
        engine=params(logprobs=2),
        reply={"choices.0.logprobs.content.0.top_logprobs": some},
    ),
    Row(
        field="tools",
        body={"tools": TOOLS},
        says=(JAMBA_CALL,),
        engine=params(grammar=some),
        reply={_CALLED_NAME: "get_weather", CONTENT: None, "choices.0.finish_reason": "tool_calls"},
    ),
    Row(
        field="tools",
        body={"tools": TOOLS},
        says=("</think>" + HERMES_CALL,),
        model="reasoning",
        reply={_CALLED_NAME: "get_weather", "choices.0.message.tool_calls.0.function.arguments": PARIS},
    ),
    Row(field="tool_choice", base={"tools": TOOLS}, body={"tool_choice": "required"}, engine=params(grammar=DIFFERS)),
    Row(
        field="tool_choice",
        base={"tools": TOOLS},
        says=(JAMBA_CALL,),
        body={"tool_choice": "none"},
        engine=params(bad_words=some),
        reply={CONTENT: contains("get_weather")},
    ),
    Row(
        field="tool_choice.type",
        base={"tools": TOOLS},
        body={"tool_choice": {"type": "function", "function": {"name": "clock"}}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="tool_choice.function.name",
        base={"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        body={"tool_choice": {"type": "function", "function": {"name": "clock"}}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="tool_choice.allowed_tools.tools.function.name",
        base={"tools": TOOLS},
        says=(JAMBA_CALL,),
        body=_choice("clock"),
        reply={CONTENT: contains("get_weather"), "choices.0.finish_reason": "stop"},
    ),
    Row(
        field="tool_choice.allowed_tools.mode",
        base={"tools": TOOLS, **_choice("clock")},
        body=_choice("clock", mode="required"),
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="parallel_tool_calls",
        base={"tools": TOOLS},
        body={"parallel_tool_calls": False},
        says=(TWO_CALLS,),
        engine=params(grammar=DIFFERS),
        reply={CONTENT: contains("clock")},
    ),
    Row(
        field="include_reasoning",
        body={"include_reasoning": False},
        says=(THOUGHTS,),
        model="reasoning",
        reply={"choices.0.message": {"role": "assistant", "content": "hello", "refusal": None}},
    ),
    Row(
        field="thinking_token_budget",
        body={"thinking_token_budget": 5},
        says=(THOUGHTS,),
        model="reasoning",
        engine=params(thinking_token_budget=5, thinking_end=some),
    ),
]
INERT = [
    *shared_rows.INERT,
    *shared_rows.INERT_FORMS,
    *shared_rows.INERT_RESPONSE_FORMATS,
    *INERT_MESSAGES,
    Inert("store", {"store": True}),
    Inert("prediction", {"prediction": {"type": "content", "content": "hello"}}),
    Inert("add_special_tokens", {"add_special_tokens": False}),
]
REFUSED = [
    *shared_rows.REFUSED,
    *shared_rows.REFUSED_STREAM,
    *REFUSED_MESSAGES,
    Refused(
        "tools.function.strict",
        _with_name(strict=True, parameters={"type": "object", "not": {"required": ["a"]}}),
        "tools.0.function.parameters",
    ),
    Refused(
        "tool_choice.allowed_tools.tools.type",
        {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}},
        },
        "tool_choice.allowed_tools.tools.0.type",
    ),
    Refused("functions", {"functions": [{"name": "f"}]}),
    Refused("function_call", {"function_call": {"name": "f"}}),
    Refused("modalities", {"modalities": ["text", "audio"]}),
    Refused("audio", {"audio": {"voice": "a", "format": "wav"}}),
    Refused("moderation", {"moderation": {"model": "a"}}),
    Refused("web_search_options", {"web_search_options": {}}),
    Refused("add_special_tokens", {"add_special_tokens": True}),
]
