"""The routes POST /v1/messages and POST /v1/messages/count_tokens, which are Anthropic's API for chats."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.chat_task import ChatTask, Tool, ToolMode, plan_chat, render_task
from jamba_server.server.http.routes.admission import prepared, require, wait_for_start
from jamba_server.server.http.routes.replies import STREAM, json_response
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.messages.reply import Hello, MessageErrorReply, MessageReply, TokensCount
from jamba_server.server.http.schemas.messages.request import Conversation, CountTokensRequest, MessagesRequest
from jamba_server.server.http.schemas.messages.tools import ToolDefinition
from jamba_server.server.http.schemas.messages.translate import Translated, translate
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.unknown_fields import ignore_field, settle_unknown_fields, warn
from jamba_server.server.http.writers.messages import MessagesWriter
from jamba_server.server.text.grammars.types import OutputFormat

router = APIRouter(tags=["generation"])

_TOOL_MODES: dict[str, ToolMode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessageErrorReply}, "5XX": {"model": MessageErrorReply}}


@router.post("/v1/messages", response_model=MessageReply, responses=STREAM | _ERRORS)
async def create_message(body: MessagesRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the next message of a conversation. With `stream`, it is sent as Anthropic's events."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    require(services, "generate")
    model = services.model(body.model)
    conversation = translate(body)
    _warn_of_left_out(body, conversation, request)
    sampling = GenerationBody(
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        cache=body.cache,
    )
    task = _task(body, conversation, sampling, request, services)
    id_ = f"msg_{uuid.uuid4().hex}"
    spec = await prepared(request, plan_chat(task, services, id_=id_, scope=request.scope))
    writer = MessagesWriter(
        generation=services.generation(spec),
        model=model,
        max_tokens=body.max_tokens,
        num_saved=max(spec.prompts[0].save_positions, default=0) if conversation.save_after and spec.cache.write else 0,
        shows_thinking=body.thinking is None or body.thinking.display != "omitted",
    )
    return await answer(request, writer, services, stream=bool(body.stream))


@router.post("/v1/messages/count_tokens", response_model=TokensCount, responses=_ERRORS)
async def count_tokens(body: CountTokensRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the number of prompt tokens that a conversation would have."""
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    services.model(body.model)
    conversation = translate(body)
    _warn_of_left_out(body, conversation, request)
    task = _task(body, conversation, GenerationBody(max_tokens=0), request, services)
    chat = await prepared(request, render_task(task, services, request.scope))
    return json_response(TokensCount(input_tokens=len(chat.prompt_ids)))


@router.get("/api/hello", response_model=Hello)
async def hello() -> Response:
    """Answers a probe that Claude Code sends before its first request."""
    return json_response(Hello())


def _task(
    body: Conversation, conversation: Translated, sampling: GenerationBody, request: Request, services: Services
) -> ChatTask:
    choice = body.tool_choice
    continues = body.messages[-1].role == "assistant"
    effort, budget = _thinking(body, request, services)
    return ChatTask(
        messages=conversation.messages,
        body=sampling,
        tools=tuple(_tool(tool, position) for position, tool in enumerate(body.tools or ()) if tool.is_custom),
        tool_choice=_TOOL_MODES[choice.type] if choice else "auto",
        allowed_tools=frozenset({choice.name}) if choice and choice.type == "tool" and choice.name else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        output_format=_output_format(body),
        reasoning_effort=effort,
        thinking_token_budget=budget,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        save_after=conversation.save_after,
    )


def _thinking(body: Conversation, request: Request, services: Services) -> tuple[str | None, int | None]:
    """Returns the reasoning effort that a request asks for, and the maximum number of reasoning tokens. The effort
    "none" means no reasoning.

    Fields that have no effect with this model are listed in the reply's header X-Ignored-Fields.
    """
    thinking, template = body.thinking, services.chat_template
    is_on = thinking is not None and thinking.is_on
    effort = body.output_config.effort if body.output_config else None
    if effort and not (is_on and template is not None and "reasoning_effort" in template.variables):
        ignore_field("output_config.effort", request.scope, services)
        effort = None
    if thinking is None or not is_on:
        return "none", None
    if not services.reply_style.reasoning:
        ignore_field("thinking", request.scope, services)
        return effort, None
    return effort, thinking.budget_tokens


def _tool(tool: ToolDefinition, position: int) -> Tool:
    return Tool(
        name=tool.name,
        description=tool.description or "",
        parameters=tool.input_schema or {},
        strict=bool(tool.strict),
        param=f"tools.{position}.input_schema",
    )


def _output_format(body: Conversation) -> OutputFormat | None:
    if (schema := body.json_schema) is None:
        return None
    param = "output_format" if body.output_format else "output_config.format"
    return OutputFormat(kind="json_schema", value=schema, param=param)


def _warn_of_left_out(body: Conversation, conversation: Translated, request: Request) -> None:
    """If parts of the request do not reach the model, such as images or unsupported tools, adds the header X-Warning to
    the reply."""
    types = {tool.type for tool in body.tools or () if tool.type is not None and not tool.is_custom}
    left_out = [*sorted(conversation.left_out), *(f"tools of the type {type_}" for type_ in sorted(types))]
    if left_out:
        warn(f"the model does not read {', '.join(left_out)}", request.scope)
