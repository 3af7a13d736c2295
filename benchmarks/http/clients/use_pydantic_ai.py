"""Tries the agent library pydantic-ai."""

import asyncio
from typing import Literal

from checks import MAX_TOKENS, MODEL, QUESTION, URL, check, check_arguments
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(
    MODEL,
    provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"),
    profile={"supports_json_schema_output": True},
)
settings = {"max_tokens": MAX_TOKENS}


class Lamp(BaseModel):
    """Switches a lamp."""

    room: Literal["kitchen", "hall"]
    on: bool


def chat():
    assert Agent(model, model_settings=settings).run_sync(QUESTION).output


def stream():
    async def run():
        async with Agent(model, model_settings=settings).run_stream(QUESTION) as reply:
            return "".join([piece async for piece in reply.stream_text(delta=True)])

    assert asyncio.run(run())


def call():
    agent = Agent(model, model_settings=settings, output_type=ToolOutput(Lamp), retries=0)
    check_arguments(agent.run_sync(QUESTION).output.model_dump())


def schema():
    agent = Agent(model, model_settings=settings, output_type=NativeOutput(Lamp), retries=0)
    check_arguments(agent.run_sync(QUESTION).output.model_dump())


check("chat", chat)
check("stream", stream)
check("tool call", call)
check("schema", schema)
