"""The whole conversation of a session as a `ChatTask`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jamba_server.server.http.chat_task import ChatTask
from jamba_server.server.http.response_task import chat_task
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.responses.request import ResponseRequest
from jamba_server.server.http.schemas.responses.tools import FunctionNames
from jamba_server.server.http.services import Services


async def conversation(response_id: str, owner: str, services: Services, body: GenerationBody) -> ChatTask:
    """Returns the task whose prompt is the conversation up to and including a stored response. A request that continues
    the conversation, with the same instructions and tools, has a prompt that begins in the same way.

    Raises ResponseNotFound or RequestRejected if the conversation is not stored or too large.
    """
    head = json.loads((await services.responses.get(response_id, owner)).response)
    limit = services.config.max_body_bytes
    history = await services.responses.conversation(response_id, owner, max_bytes=limit)
    same = continuing_request(head)
    return replace(
        chat_task(same, FunctionNames.of(same.declared_tools), history), body=body, add_generation_prompt=False
    )


def continuing_request(response: Mapping[str, Any]) -> ResponseRequest:
    """Returns a request with the instructions and tools of a stored response, which is given as JSON. Raises
    ValidationError if a request may not have them."""
    body = {"input": "-", "instructions": response["instructions"], "tools": response["tools"] or None}
    return ResponseRequest.model_validate(body)
