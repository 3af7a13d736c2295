"""Rows of /v1/responses."""

from __future__ import annotations

from typing import Any

from tests.conformance import shared_rows
from tests.conformance.rows import DIFFERS, Inert, Refused, Row, contains, params, some
from tests.conformance.shared_rows import SCHEMA

TEXT = "output.0.content.0.text"
LOGPROBS = "message.output_text.logprobs"
# Fields of a request that the response repeats, although they have no other effect.
ECHOED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "max_tool_calls", "text"})
CLOCK = {"type": "function", "name": "clock"}
WEATHER = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
NAMESPACE = {"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "find"}]}
CALL = {"type": "function_call", "call_id": "call_1", "name": "clock", "arguments": "{}"}
CUSTOM_CALL = {"type": "custom_tool_call", "call_id": "call_1", "name": "patch", "input": "a"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "noon"}
CUSTOM_OUTPUT = {"type": "custom_tool_call_output", "call_id": "call_1", "output": "noon"}
USER = {"role": "user", "content": "Hi"}
ENCODED = "jamba-reasoning:YmVjYXVzZQ=="  # the word "because" in base64


def _input(*items: dict[str, Any]) -> dict[str, Any]:
    return {"input": [USER, *items]}


def _tool(**changes: Any) -> dict[str, Any]:
    return {"tools": [{**CLOCK, **changes}]}


def _member(**changes: Any) -> dict[str, Any]:
    return {"tools": [{**NAMESPACE, "tools": [{"type": "function", "name": "find", **changes}]}]}


def _form(field: str, format_: dict[str, Any]) -> Row:
    return Row(field=field, body={"text": {"format": format_}}, engine=params(grammar=some))


ITEM_ROWS = [
    Row(field="input", body={"input": "Who?"}, prompt="<|user|> Who?"),
    Row(field="input.role", body={"input": [{**USER, "role": "developer"}]}, prompt="<|system|> Hi"),
    Row(field="input.role", body={"input": [{**USER, "role": "assistant"}, USER]}, prompt="<|assistant|> Hi"),
    Row(field="input.content", body={"input": [{**USER, "content": "Who?"}]}, prompt="<|user|> Who?"),
    Row(
        field="input.type",
        base=_input(),
        body=_input({**USER, "type": "message"}),
        prompt="Hi<|eom|><|bom|><|user|> Hi",
    ),
    Row(
        field="input.content.text",
        body=_input({"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}),
        prompt="a\nb",
    ),
    Row(
        field="input.content.refusal",
        body=_input({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}),
        prompt="<|assistant|> No.",
    ),
    Row(field="input.name", base=_input(CALL), body=_input({**CALL, "name": "watch"}), prompt="[call_1 watch {}]"),
    Row(
        field="input.call_id",
        base=_input(CALL),
        body=_input({**CALL, "call_id": "call_2"}),
        prompt="[call_2 clock {}]",
    ),
    Row(
        field="input.arguments",
        base=_input(CALL),
        body=_input({**CALL, "arguments": '{"a": 1}'}),
        prompt='[call_1 clock {"a": 1}]',
    ),
    Row(
        field="input.namespace",
        base=_input(CALL),
        body=_input({**CALL, "namespace": "crm"}),
        prompt="[call_1 crm__clock {}]",
    ),
    Row(
        field="input.input",
        base=_input(CUSTOM_CALL),
        body=_input({**CUSTOM_CALL, "input": "b"}),
        prompt='[call_1 patch {"input": "b"}]',
    ),
    Row(
        field="input.output",
        base=_input(CALL, OUTPUT),
        body=_input(CALL, {**OUTPUT, "output": "night"}),
        prompt="<|tool|> [call_1]night",
    ),
    Row(
        field="input.output",
        base=_input(CUSTOM_CALL, CUSTOM_OUTPUT),
        body=_input(CUSTOM_CALL, {**CUSTOM_OUTPUT, "output": "night"}),
        prompt="<|tool|> [call_1]night",
    ),
    Row(
        field="input.output.text",
        base=_input(CALL, OUTPUT),
        body=_input(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": t} for t in "ab"]}),
        prompt="<|tool|> [call_1]a\nb",
    ),
    Row(
        field="input.output.refusal",
        base=_input(CALL, OUTPUT),
        body=_input(CALL, {**OUTPUT, "output": [{"type": "refusal", "refusal": "No."}]}),
        prompt="<|tool|> [call_1]No.",
    ),
    Row(
        field="input.encrypted_content",
        body=_input({"type": "reasoning", "summary": [], "encrypted_content": ENCODED}, {**USER, "role": "assistant"}),
        prompt="{because}Hi",
    ),
    Row(
        field="input.content",
        body=_input(
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "because"}]},
            {**USER, "role": "assistant"},
        ),
        prompt="{because}Hi",
    ),
]
_REASONING = {"type": "reasoning", "summary": []}
ROWS = [
    *shared_rows.sampling_rows(TEXT),
    *shared_rows.FORM_ROWS,
    *ITEM_ROWS,
    Row(field="session", body={"session": "talk"}, reply={"session": "talk"}, streamed=False),
    Row(field="instructions", body={"instructions": "Be kind."}, prompt="<|system|> Be kind."),
    Row(
        field="max_output_tokens",
        body={"max_output_tokens": 2},
        engine=params(max_tokens=2),
        reply={"status": "incomplete", "incomplete_details.reason": "max_output_tokens"},
    ),
    _form("text.format.type", {"type": "json_object"}),
    _form("text.format.schema", {"type": "json_schema", "name": "a", "schema": SCHEMA}),
    Row(field="reasoning.effort", body={"reasoning": {"effort": "high"}}, prompt="effort:high"),
    Row(
        field="reasoning.effort",
        body={"reasoning": {"effort": "none"}},
        prompt="<think>\n\n</think>",
        model="reasoning",
    ),
    Row(
        field="tools",
        body={"tools": [WEATHER, CLOCK]},
        says=('<tool_calls>[{"name": "get_weather", "arguments": {"a": 1}}]</tool_calls>',),
        engine=params(grammar=some),
        reply={"output.0.name": "get_weather", "output.0.arguments": '{"a": 1}'},
    ),
    Row(
        field="tools.tools",
        body={"tools": [NAMESPACE]},
        says=('<tool_calls>[{"name": "crm__find", "arguments": {}}]</tool_calls>',),
        reply={"output.0.name": "find", "output.0.namespace": "crm"},
    ),
    Row(field="tools.name", base=_tool(), body=_tool(name="watch"), prompt='"name": "watch"'),
    Row(field="tools.description", base=_tool(), body=_tool(description="Time"), prompt="Time"),
    Row(field="tools.parameters", base=_tool(), body=_tool(parameters=SCHEMA), prompt='"integer"'),
    Row(
        field="tools.type",
        body={"tools": [{"type": "web_search"}]},
        headers={"x-warning": contains("web_search")},
    ),
    Row(
        field="tools.description",
        base={"tools": [NAMESPACE]},
        body={"tools": [{**NAMESPACE, "description": "Customers."}]},
        reply={"tools.0.description": "Customers."},
    ),
    Row(field="tools.tools.name", base=_member(), body=_member(name="get"), prompt='"name": "crm__get"'),
    Row(field="tools.tools.description", base=_member(), body=_member(description="Finds"), prompt="Finds"),
    Row(field="tools.tools.parameters", base=_member(), body=_member(parameters=SCHEMA), prompt='"integer"'),
    Row(
        field="tools.tools.type",
        base=_member(),
        body=_member(type="custom"),
        headers={"x-warning": contains("custom")},
    ),
    Row(
        field="tool_choice",
        base={"tools": [CLOCK]},
        body={"tool_choice": "required"},
        engine=params(grammar=DIFFERS),
        reply={"tool_choice": "required"},
    ),
    Row(
        field="tool_choice",
        base={"tools": [CLOCK]},
        body={"tool_choice": "none"},
        engine=params(bad_words=some),
        reply={"tool_choice": "none"},
    ),
    *(
        Row(
            field=f"tool_choice.{name}",
            base={"tools": [CLOCK, WEATHER], "tool_choice": other},
            body={"tool_choice": {"type": "function", "name": "clock"}},
            engine=params(grammar=DIFFERS),
            reply={"tool_choice.name": "clock"},
        )
        for name, other in {"type": "auto", "name": {"type": "function", "name": "get_weather"}}.items()
    ),
    Row(
        field="tool_choice.tools",
        base={"tools": [CLOCK, WEATHER]},
        body={"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CLOCK]}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="tool_choice.mode",
        base={"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CLOCK]}},
        body={"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [CLOCK]}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="parallel_tool_calls",
        base={"tools": [CLOCK]},
        body={"parallel_tool_calls": False},
        engine=params(grammar=DIFFERS),
        reply={"parallel_tool_calls": False},
    ),
    Row(
        field="include",
        body={"include": [LOGPROBS]},
        engine=params(logprobs=0),
        reply={"output.0.content.0.logprobs": some},
    ),
    Row(
        field="include",
        body={"include": ["reasoning.encrypted_content"]},
        says=("because</think>Hi",),
        model="reasoning",
        reply={"output.0.encrypted_content": ENCODED},
    ),
    Row(
        field="top_logprobs",
        base={"include": [LOGPROBS]},
        body={"top_logprobs": 2},
        engine=params(logprobs=2),
        reply={"output.0.content.0.logprobs.0.top_logprobs": some, "top_logprobs": 2},
    ),
    Row(field="store", body={"store": False}, reply={"store": False}),
    Row(field="truncation", body={"truncation": "auto"}, reply={"truncation": "auto"}),
]
_JSON_SCHEMA = {"type": "json_schema", "name": "a", "schema": SCHEMA}
INERT = [
    *shared_rows.INERT,
    *shared_rows.INERT_FORMS,
    # These are fields of the other endpoints. The last event of a response always has the token counts.
    *(
        Inert(f"stream_options.{name}", {"stream_options": {name: True}}, {"stream_options": {}}, unstreamed=False)
        for name in ("include_usage", "continuous_usage_stats")
    ),
    Inert("max_tool_calls", {"max_tool_calls": 3}),
    *(
        Inert(
            f"text.format.{name}",
            {"text": {"format": {**_JSON_SCHEMA, name: value}}},
            {"text": {"format": _JSON_SCHEMA}},
        )
        for name, value in {"name": "b", "description": "a note", "strict": True}.items()
    ),
    Inert("text.verbosity", {"text": {"format": {"type": "text"}, "verbosity": "low"}}),
    Inert("reasoning.summary", {"reasoning": {"summary": "auto"}}),
    Inert("reasoning.generate_summary", {"reasoning": {"generate_summary": "auto"}}),
    *(
        Inert(f"input.{name}", _input({**USER, name: value}), _input(USER))
        for name, value in {"id": "msg_1", "status": "completed", "phase": "commentary"}.items()
    ),
    *(
        Inert(
            f"input.{kind}.{name}",
            _input(*item({"type": "output_text", "text": "a", name: []})),
            _input(*item({"type": "output_text", "text": "a"})),
        )
        for name in ("annotations", "logprobs")
        for kind, item in {
            "content": lambda part: [{"role": "assistant", "content": [part]}, USER],
            "output": lambda part: [CALL, {**OUTPUT, "output": [part]}],
        }.items()
    ),
    Inert(
        "input.summary", _input({**_REASONING, "summary": [{"type": "summary_text", "text": "a"}]}), _input(_REASONING)
    ),
]
REFUSED = [
    *shared_rows.REFUSED,
    *shared_rows.REFUSED_STREAM,
    Refused("input", {"input": [_REASONING]}),
    Refused("n", {"n": 2}),
    Refused("max_tokens", {"max_tokens": 2}),
    Refused("max_completion_tokens", {"max_completion_tokens": 2}),
    Refused("response_format", {"response_format": {"type": "json_object"}}),
    Refused("background", {"background": True}),
    Refused("conversation", {"conversation": "conv_1"}),
    Refused("prompt", {"prompt": {"id": "pmpt_1"}}),
    Refused("context_management", {"context_management": [{"type": "compaction"}]}),
    Refused("moderation", {"moderation": {"model": "a"}}),
    Refused(
        "input.content.type",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
        "input.0.content.0",
    ),
    Refused(
        "input.output.type",
        {"input": [{**OUTPUT, "output": [{"type": "input_image", "image_url": "a"}]}]},
        "input.0.output.0",
    ),
    Refused(
        "input.summary.type",
        {"input": [{**_REASONING, "summary": [{"type": "picture", "text": "a"}]}]},
        "input.0.summary.0.type",
    ),
    Refused("input.summary.text", {"input": [{**_REASONING, "summary": [{"type": "text"}]}]}, "input.0.summary.0.text"),
    *(
        Refused(
            f"tools.{path}",
            {"tools": [tools]},
            param,
        )
        for path, tools, param in (
            ("strict", {**CLOCK, "strict": True, "parameters": {"not": {}}}, "tools.0.parameters"),
            (
                "tools.strict",
                {**NAMESPACE, "tools": [{**CLOCK, "strict": True, "parameters": {"not": {}}}]},
                "tools.0.tools.0.parameters",
            ),
        )
    ),
]
