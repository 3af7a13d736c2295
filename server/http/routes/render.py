"""The route POST /v1/chat/completions/render, which shows the prompt of a request without running it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.chat_task import render_task
from jamba_server.server.http.routes.admission import prepared, wait_for_start
from jamba_server.server.http.routes.chat import chat_task, warn_of_other_tools
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.chat import ChatCompletionRequest
from jamba_server.server.http.schemas.models import RenderReply
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.unknown_fields import settle_unknown_fields

router = APIRouter(tags=["text"])


@router.post("/v1/chat/completions/render", response_model=RenderReply, responses=ERRORS)
async def render_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the prompt that the chat template makes from a request for a chat completion."""
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    services.model(body.model)
    warn_of_other_tools(body.tools, request.scope)
    chat = await prepared(request, render_task(chat_task(body), services, request.scope))
    reply = RenderReply(
        prompt=chat.text,
        token_ids=chat.prompt_ids,
        count=len(chat.prompt_ids),
        max_model_len=services.engine.info.max_model_len,
        save_positions=list(chat.save_positions),
        opens_reasoning=chat.opens_reasoning,
    )
    return await services.in_thread(lambda: json_response(reply))
