"""Tries OpenAI's own Python client."""

import json

from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments
from openai import OpenAI

client = OpenAI(base_url=f"{URL}/v1", api_key="none")
messages = [{"role": "user", "content": QUESTION}]
tool = {"type": "function", "function": {"name": "set_lamp", "description": "Switches a lamp.", "parameters": SCHEMA}}


def create(**fields):
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=MAX_TOKENS, **fields)


def chat():
    assert create().choices[0].message.content


def stream():
    assert "".join(chunk.choices[0].delta.content or "" for chunk in create(stream=True) if chunk.choices)


def call():
    reply = create(tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.tool_calls
    check_arguments(json.loads(reply.message.tool_calls[0].function.arguments))


def schema():
    format_ = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA, "strict": True}}
    check_arguments(json.loads(create(response_format=format_).choices[0].message.content or ""))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
