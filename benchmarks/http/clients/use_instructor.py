"""Tries the library instructor, which makes a model return a Python object: by a tool call, by a JSON schema, and as a
stream."""

from typing import Literal

import instructor
from checks import MAX_TOKENS, MODEL, QUESTION, URL, check, check_arguments
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Lamp(BaseModel):
    """Switches a lamp."""

    model_config = ConfigDict(extra="forbid")  # without this setting the schema would allow any other fields

    room: Literal["kitchen", "hall"]
    on: bool


def create(mode, method="create", **fields):
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=mode)
    return getattr(client.chat.completions, method)(
        model=MODEL,
        response_model=Lamp,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MAX_TOKENS,
        max_retries=0,
        **fields,
    )


def stream():
    *_, last = create(instructor.Mode.TOOLS, "create_partial", parallel_tool_calls=False)
    check_arguments(last.model_dump())


check("stream", stream)
check("tool call", lambda: check_arguments(create(instructor.Mode.TOOLS, parallel_tool_calls=False).model_dump()))
check("schema", lambda: check_arguments(create(instructor.Mode.JSON_SCHEMA).model_dump()))
