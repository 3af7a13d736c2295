"""Tries LangChain with its class for Anthropic's API."""

from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments
from langchain_anthropic import ChatAnthropic

model = ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=MAX_TOKENS, max_retries=0)
tool = {"name": "set_lamp", "description": "Switches a lamp.", "input_schema": SCHEMA}


def chat():
    assert model.invoke(QUESTION).content


def stream():
    assert "".join(chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in model.stream(QUESTION))


def call():
    [found] = model.bind_tools([tool], tool_choice="any").invoke(QUESTION).tool_calls[:1]
    check_arguments(found["args"])


def schema():
    lamp = {"title": "lamp", "description": "A lamp.", **SCHEMA}
    check_arguments(model.with_structured_output(lamp, method="json_schema").invoke(QUESTION))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
