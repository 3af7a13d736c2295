"""Tries LangChain, both with its class for OpenAI's API and with its class for Anthropic's."""

import sys

from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments

api = sys.argv[1]
about = {"name": "set_lamp", "description": "Switches a lamp."}
options = {"model": MODEL, "api_key": "none", "max_tokens": MAX_TOKENS, "max_retries": 0}
if api == "openai":
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{URL}/v1", **options)
    tool, required = {"type": "function", "function": {**about, "parameters": SCHEMA}}, "required"
else:
    from langchain_anthropic import ChatAnthropic

    model = ChatAnthropic(base_url=URL, **options)
    tool, required = {**about, "input_schema": SCHEMA}, "any"


def text_of(chunk):
    """Returns the text of a chunk: in some versions of LangChain `text` is an attribute, in others a method."""
    return chunk.text if isinstance(chunk.text, str) else chunk.text()


def chat():
    assert model.invoke(QUESTION).content


def stream():
    assert "".join(text_of(chunk) for chunk in model.stream(QUESTION))


def call():
    [found] = model.bind_tools([tool], tool_choice=required).invoke(QUESTION).tool_calls[:1]
    check_arguments(found["args"])


def schema():
    lamp = {"title": "lamp", "description": "A lamp.", **SCHEMA}
    check_arguments(model.with_structured_output(lamp, method="json_schema").invoke(QUESTION))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
