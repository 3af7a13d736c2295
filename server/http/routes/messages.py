"""The routes POST /v1/messages and POST /v1/messages/count_tokens, which are Anthropic's API for chats."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.chat_task import ChatTask, Tool, plan_chat
from jamba_server.server.http.routes.admission import wait_for_start
from jamba_server.server.http.routes.replies import json_response
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.messages.reply import MessageErrorReply, MessageReply, TokensCount
from jamba_server.server.http.schemas.messages.request import Conversation, CountTokensRequest, MessagesRequest
from jamba_server.server.http.schemas.messages.translate import Translated, translate
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.unknown_fields import add_reply_header, settle_unknown_fields
from jamba_server.server.http.writers.messages import MessagesWriter

router = APIRouter(tags=["generation"])

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessageErrorReply}, "5XX": {"model": MessageErrorReply}}


@router.post("/v1/messages", response_model=MessageReply, responses=_ERRORS)
async def create_message(body: MessagesRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the next message of a conversation. With `stream`, it is sent as Anthropic's events."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    model = services.model(body.model)
