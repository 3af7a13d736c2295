"""Rows of /v1/messages."""

from __future__ import annotations

from typing import Any

from tests.conformance.rows import DIFFERS, Inert, Refused, Row, contains, params, some
from tests.conformance.shared_rows import CACHE_ROWS, SCHEMA

TEXT = "content.0.text"
USER = {"role": "user", "content": "Hi"}
MARK: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
WEATHER = {"name": "get_weather", "input_schema": SCHEMA}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}
THOUGHTS = "because\n</think>\n\nhello"
ON = {"type": "enabled", "budget_tokens": 20}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
# Fields that say how the reply is made. /v1/messages/count_tokens lacks them.
ONLY_GENERATION = frozenset(
    {
        "max_tokens",
        "stream",
        "stop_sequences",
        "temperature",
        "top_p",
        "top_k",
        "metadata",
        "service_tier",
        "inference_geo",
        "diagnostics",
        "cache",
        *(row.field for row in CACHE_ROWS),
    }
)


def _user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def _assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": list(blocks)}, USER]}


def _results(**changes: Any) -> dict[str, Any]:
    used = {"role": "assistant", "content": [USE]}
    return {"messages": [USER, used, {"role": "user", "content": [{**RESULT, **changes}]}]}


def _text(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


def _tool(**changes: Any) -> dict[str, Any]:
    return {"tools": [{**CLOCK, **changes}]}


def _saved(field: str, base: dict[str, Any], body: dict[str, Any]) -> Row:
    """A row of a mark. The tokens before it count as written to the cache."""
    return Row(
        field=field,
        base=base,
        body=body,
        reply={"usage.cache_creation_input_tokens": some},
    )


LONG = "a" * 64
_LONG_HISTORY = {"role": "user", "content": LONG}
ROWS = [
    Row(field="model", body={"model": "alias"}, reply={"model": "alias"}),
    *(
        Row(field=name, body={name: value}, engine=params(**{name: value}))
        for name, value in {"temperature": 0.5, "top_p": 0.25, "top_k": 7}.items()
    ),
    Row(field="max_tokens", body={"max_tokens": 2}, engine=params(max_tokens=2), reply={"stop_reason": "max_tokens"}),
    Row(
        field="stop_sequences",
        body={"stop_sequences": [" the"]},
        reply={TEXT: "hello", "stop_reason": "stop_sequence", "stop_sequence": " the"},
    ),
    *CACHE_ROWS,
    Row(field="system", body={"system": "Be kind."}, prompt="<|system|> Be kind."),
    Row(field="system.text", body={"system": [_text("a"), _text("b")]}, prompt="<|system|> a\nb"),
    Row(field="messages.role", body={"messages": [{"role": "system", "content": "Hi"}, USER]}, prompt="<|system|> Hi"),
    Row(field="messages.role", body={"messages": [{**USER, "role": "assistant"}]}, prompt="<|assistant|> Hi"),
    Row(field="messages.content", body={"messages": [{**USER, "content": "Who?"}]}, prompt="<|user|> Who?"),
    Row(field="messages.content.text", base=_user(_text()), body=_user(_text("a"), _text("b")), prompt="a\nb"),
    Row(field="messages.content.type", base=_user(_text()), body=_assistant(USE), prompt="[toolu_1 clock {}]"),
    Row(
        field="messages.content.id",
        base=_assistant(USE),
        body=_assistant({**USE, "id": "toolu_2"}),
        prompt="[toolu_2 clock {}]",
    ),
    Row(
        field="messages.content.name",
        base=_assistant(USE),
        body=_assistant({**USE, "name": "watch"}),
        prompt="[toolu_1 watch {}]",
    ),
    Row(
        field="messages.content.input",
        base=_assistant(USE),
        body=_assistant({**USE, "input": {"a": 1}}),
        prompt='clock {"a": 1}',
    ),
    Row(
        field="messages.content.thinking",
        base=_assistant(_text("Yes")),
        body=_assistant({"type": "thinking", "thinking": "because", "signature": ""}, _text("Yes")),
        prompt="{because}Yes",
    ),
    Row(
        field="messages.content.data",
        base=_assistant(_text("Yes")),
        body=_assistant({"type": "redacted_thinking", "data": "xyz"}, _text("Yes")),
        headers={"x-warning": contains("redacted")},
    ),
    Row(
        field="messages.content.tool_use_id",
        base=_results(),
        body=_results(tool_use_id="toolu_2"),
        prompt="<|tool|> [toolu_2]noon",
    ),
    Row(field="messages.content.content", base=_results(), body=_results(content="night"), prompt="[toolu_1]night"),
    Row(
        field="messages.content.content.text",
        base=_results(),
        body=_results(content=[_text("a"), _text("b")]),
        prompt="[toolu_1]a\nb",
    ),
    Row(
        field="messages.content.content.tool_name",
        base=_results(),
        body=_results(content=[{"type": "tool_reference", "tool_name": "watch"}]),
        prompt="[toolu_1]watch",
    ),
    Row(
        field="messages.content.content.type",
        base=_results(content=[_text("watch!")]),
        body=_results(content=[{"type": "tool_reference", "tool_name": "watch"}]),
        prompt="[toolu_1]watch<",
    ),
    Row(
        field="messages.content.is_error", base=_results(), body=_results(is_error=True), prompt="[toolu_1]Error: noon"
    ),
    Row(
        field="tools",
        body={"tools": [WEATHER]},
        says=(' Look.<tool_calls>[{"name": "get_weather", "arguments": {"a": 1}}]</tool_calls>',),
        engine=params(grammar=some),
        reply={TEXT: "Look.", "content.1.input": {"a": 1}, "stop_reason": "tool_use"},
    ),
    Row(field="tools.name", base=_tool(), body=_tool(name="watch"), prompt='"name": "watch"'),
    Row(field="tools.description", base=_tool(), body=_tool(description="Time"), prompt="Time"),
    Row(field="tools.input_schema", base=_tool(), body=_tool(input_schema=SCHEMA), prompt='"integer"'),
    Row(
        field="tools.type",
        body={"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        headers={"x-warning": contains("web_search")},
    ),
    Row(
        field="tool_choice.type",
        base={"tools": [CLOCK]},
        body={"tool_choice": {"type": "any"}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="tool_choice.name",
        base={"tools": [CLOCK, WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}},
        body={"tool_choice": {"type": "tool", "name": "clock"}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="tool_choice.disable_parallel_tool_use",
        base={"tools": [CLOCK]},
        body={"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        engine=params(grammar=DIFFERS),
    ),
    Row(
        field="thinking.type",
        body={"thinking": ON},
        says=(THOUGHTS,),
        model="reasoning",
        reply={"content.0.thinking": "because", "content.1.text": "hello"},
    ),
    Row(
        field="thinking.budget_tokens",
        base={"thinking": ON},
        body={"thinking": {**ON, "budget_tokens": 5}},
        says=(THOUGHTS,),
        model="reasoning",
        engine=params(thinking_token_budget=5),
    ),
    Row(
        field="thinking.display",
        base={"thinking": ON},
        body={"thinking": {**ON, "display": "omitted"}},
        says=(THOUGHTS,),
        model="reasoning",
        reply={"content.0.thinking": ""},
    ),
    Row(
        field="output_config.effort",
        base={"thinking": ON},
        body={"output_config": {"effort": "high"}},
        prompt="effort:high",
    ),
    Row(field="output_config.format.schema", body={"output_config": {"format": FORMAT}}, engine=params(grammar=some)),
    Row(field="output_format.schema", body={"output_format": FORMAT}, engine=params(grammar=some)),
]
_LONG_CALL = {**USE, "input": {"a": LONG}}
_MARK_ROWS = [
    _saved("cache_control.type", {"messages": [_LONG_HISTORY]}, MARK),
    _saved("system.cache_control.type", {"system": [_text(LONG)]}, {"system": [_text(LONG, **MARK)]}),
    _saved("tools.cache_control.type", {"system": "a", **_tool(description=LONG)}, _tool(description=LONG, **MARK)),
    _saved("messages.content.cache_control.type", _user(_text(LONG)), _user(_text(LONG, **MARK))),
    _saved("messages.content.cache_control.type", _assistant(_LONG_CALL), _assistant({**_LONG_CALL, **MARK})),
    _saved("messages.content.cache_control.type", _results(content=LONG), _results(content=LONG, **MARK)),
    _saved(
        "messages.content.content.cache_control.type",
        _results(content=[_text(LONG)]),
        _results(content=[_text(LONG, **MARK)]),
    ),
]
ROWS.extend(_MARK_ROWS)
_TTL: dict[str, Any] = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
INERT = [
    Inert("speed", {"speed": "fast"}),
    Inert("metadata", {"metadata": {"user_id": "somebody"}}),
    Inert("service_tier", {"service_tier": "auto"}),
    Inert("inference_geo", {"inference_geo": "eu"}),
    Inert("diagnostics", {"diagnostics": {"a": 1}}),
    Inert("cache_control.ttl", _TTL, MARK),
    Inert("system.cache_control.ttl", {"system": [_text(**_TTL)]}, {"system": [_text(**MARK)]}),
    Inert("tools.cache_control.ttl", _tool(**_TTL), _tool(**MARK)),
    Inert("messages.content.cache_control.ttl", _user(_text(**_TTL)), _user(_text(**MARK))),
    Inert(
        "messages.content.content.cache_control.ttl",
        _results(content=[_text(**_TTL)]),
        _results(content=[_text(**MARK)]),
    ),
    Inert(
        "messages.content.signature",
        _assistant({"type": "thinking", "thinking": "a", "signature": "b"}),
        _assistant({"type": "thinking", "thinking": "a"}),
    ),
]
_IMAGE = {"type": "image", "source": {"type": "url", "url": "a"}}
REFUSED = [
    Refused("tools.name", {"tools": [CLOCK, CLOCK]}, "tools"),
    Refused("messages.content.type", _user(_IMAGE), "messages.0.content.0"),
    Refused("system.type", {"system": [{"type": "image", "text": "a"}]}, "system.0"),
    Refused("output_config.format.type", {"output_config": {"format": {**FORMAT, "type": "regex"}}}),
    Refused("output_format.type", {"output_format": {**FORMAT, "type": "regex"}}),
    Refused(
        "tools.strict",
        _tool(strict=True, input_schema={"type": "object", "not": {}}),
        "tools.0.input_schema",
    ),
]
