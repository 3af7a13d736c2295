"""Tries LiteLLM, both with OpenAI's API and with Anthropic's."""

import json
import sys

import litellm
from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments

api = sys.argv[1]
server = {"model": f"{api}/{MODEL}", "api_base": f"{URL}/v1" if api == "openai" else URL, "api_key": "none"}
tool = {"type": "function", "function": {"name": "set_lamp", "description": "Switches a lamp.", "parameters": SCHEMA}}
messages = [{"role": "user", "content": QUESTION}]


def create(**fields):
    return litellm.completion(**server, messages=messages, max_tokens=MAX_TOKENS, num_retries=0, **fields)


def chat():
    assert create().choices[0].message.content


def stream():
    assert "".join(chunk.choices[0].delta.content or "" for chunk in create(stream=True))


def call():
    [found] = create(tools=[tool], tool_choice="required").choices[0].message.tool_calls[:1]
    check_arguments(json.loads(found.function.arguments))


def schema():
    format_ = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA, "strict": True}}
    check_arguments(json.loads(create(response_format=format_).choices[0].message.content))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
