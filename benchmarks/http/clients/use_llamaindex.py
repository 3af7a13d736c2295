"""Tries LlamaIndex with its class for servers that have OpenAI's API."""

from typing import Literal

from checks import MAX_TOKENS, MODEL, QUESTION, URL, check, check_arguments
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

model = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key="none",
    max_tokens=MAX_TOKENS,
    max_retries=0,
    context_window=4096,
    is_chat_model=True,
    is_function_calling_model=True,
)
messages = [ChatMessage(role="user", content=QUESTION)]


class Lamp(BaseModel):
    """Switches a lamp."""

    room: Literal["kitchen", "hall"]
    on: bool


def set_lamp(room: Literal["kitchen", "hall"], on: bool) -> None:
    """Switches a lamp."""


def chat():
    assert model.chat(messages).message.content


def stream():
    assert "".join(part.delta or "" for part in model.stream_chat(messages))


def call():
    tool = FunctionTool.from_defaults(fn=set_lamp)
    reply = model.chat_with_tools([tool], chat_history=messages, tool_required=True)
    check_arguments(model.get_tool_calls_from_response(reply)[0].tool_kwargs)


def schema():
    check_arguments(model.as_structured_llm(Lamp).chat(messages).raw.model_dump())


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
