"""Converts messages to the form that chat templates expect, in the same way as transformers and vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, cast

Message = Mapping[str, object]

# The keys under which APIs and templates hold an assistant's reasoning. If a message has one of these keys, the first
# two keys are both set, because some templates read the first and others the second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def template_message(message: Message) -> dict[str, object]:
    """Returns a message in the form that chat templates expect.

    Templates expect that the content is not null, that the arguments of a tool call are an object, and that reasoning
    has the key `reasoning_content` or, more rarely, `thinking`.
    """
    result = dict(message)
    if result.get("content") is None:
        result["content"] = ""
    reasoning = next((result[name] for name in REASONING_FIELDS if result.get(name) is not None), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    if isinstance(calls := result.get("tool_calls"), list | tuple):
        result["tool_calls"] = [_template_call(call) for call in cast("list[object]", calls)]
    return result


def _template_call(call: object) -> object:
    """Returns a tool call whose arguments are decoded to an object. If the arguments are not the JSON text of an
    object, or have an escape that is half of a surrogate pair and cannot be part of a prompt, they stay a text."""
    if not isinstance(call, Mapping):
        return call
    fields = cast("Mapping[str, object]", call)
    function = fields.get("function")
    if not isinstance(function, Mapping):
        return fields
    arguments = cast("Mapping[str, object]", function).get("arguments")
    if not isinstance(arguments, str):
        return fields
    return {**fields, "function": {**function, "arguments": _read_object(arguments)}}


def _read_object(text: str) -> object:
    if not text.strip():
        return {}
    try:
        value: Any = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # raises an error if an escape is half of a surrogate pair
    except (ValueError, RecursionError):
        return text
    return cast("dict[str, object]", value) if isinstance(value, dict) else text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def text_bytes(value: object) -> int:
    """Returns the number of bytes of all texts in a JSON value. The names of fields do not count. Reasoning does not
    count either, because most templates leave it out of the prompt."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, object]", value)
        return sum(text_bytes(item) for name, item in fields.items() if name not in REASONING_FIELDS)
    if isinstance(value, list | tuple):
        return sum(map(text_bytes, cast("list[object]", value)))
    return 0
