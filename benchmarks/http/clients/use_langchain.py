"""Tries LangChain with its class for OpenAI's API."""

from checks import MAX_TOKENS, MODEL, QUESTION, SCHEMA, URL, check, check_arguments
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", max_tokens=MAX_TOKENS, max_retries=0)
tool = {"type": "function", "function": {"name": "set_lamp", "description": "Switches a lamp.", "parameters": SCHEMA}}


def chat():
    assert model.invoke(QUESTION).content


def stream():
    assert "".join(chunk.content for chunk in model.stream(QUESTION))


def call():
    [found] = model.bind_tools([tool], tool_choice="required").invoke(QUESTION).tool_calls[:1]
    check_arguments(found["args"])


def schema():
    lamp = {"title": "lamp", "description": "A lamp.", **SCHEMA}
    check_arguments(model.with_structured_output(lamp, method="json_schema").invoke(QUESTION))


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
