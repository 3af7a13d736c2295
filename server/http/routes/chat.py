"""The route POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.chat_task import ChatTask, plan_chat
from jamba_server.server.http.routes.admission import wait_for_start
from jamba_server.server.http.routes.replies import ERRORS
from jamba_server.server.http.schemas.chat import ChatCompletion, ChatCompletionRequest
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.unknown_fields import settle_unknown_fields
from jamba_server.server.http.writers.chat import ChatWriter

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the next message of a conversation. With `stream`, it is sent as `chat.completion.chunk` events."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services, num_choices=body.n or 1)
    model = services.model(body.model)
    spec = await plan_chat(_task(body), services, id_=f"chatcmpl-{uuid.uuid4().hex}", scope=request.scope)
    writer = ChatWriter(
        generation=services.generation(spec),
        tokenizer=services.tokenizer,
        model=model,
        created=int(time.time()),
        with_logprobs=bool(body.logprobs),
        with_usage=body.reports_usage,
        with_usage_so_far=body.reports_usage_continuously,
    )
    return await answer(request, writer, services, stream=bool(body.stream))


def _task(body: ChatCompletionRequest) -> ChatTask:
    return ChatTask(
        messages=tuple(message.to_template() for message in body.messages),
        body=body,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        output_format=body.output_format,
        add_generation_prompt=body.add_generation_prompt,
    )
