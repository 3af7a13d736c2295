"""Tries Anthropic's own Python client."""

import json

from anthropic import Anthropic
from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments

client = Anthropic(base_url=URL, api_key="none")
request = {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": QUESTION}]}
tool = {"name": "set_lamp", "description": "Switches a lamp.", "input_schema": SCHEMA}


def chat():
    assert client.messages.create(**request).content[0].text


def stream():
    with client.messages.stream(**request) as events:
        assert "".join(events.text_stream)


def call():
    choice = {"type": "any", "disable_parallel_tool_use": True}
    reply = client.messages.create(**request, tools=[tool], tool_choice=choice)
    assert reply.stop_reason == "tool_use"
    check_arguments(reply.content[-1].input)


def schema():
    reply = client.messages.create(**request, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    check_arguments(json.loads(reply.content[0].text))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
