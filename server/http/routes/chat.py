"""The route POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.server.http.chat_task import ChatTask, Tool, plan_chat
from jamba_server.server.http.deadlines import set_timeout
from jamba_server.server.http.routes.admission import prepared, require, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, STREAM
from jamba_server.server.http.schemas.chat import ChatCompletionRequest
from jamba_server.server.http.schemas.chat_replies import ChatCompletion
from jamba_server.server.http.schemas.tools import FunctionTool, NamedTool, OtherTool, Tools, mode_and_allowed
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.unknown_fields import settle_unknown_fields, warn
from jamba_server.server.http.writers.chat import ChatWriter

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM | ERRORS)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the next message of a conversation. With `stream`, it is sent as `chat.completion.chunk` events."""
    services.lifecycle.admit()
    set_timeout(request.scope, body.timeout)
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services, num_choices=body.n or 1)
    require(services, "generate")
    model = services.model(body.model)
    warn_of_other_tools(body.tools, request.scope)
    id_ = f"chatcmpl-{uuid.uuid4().hex}"
    spec = await prepared(request, plan_chat(chat_task(body), services, id_=id_, scope=request.scope))
    writer = ChatWriter(
        generation=services.generation(spec),
        tokenizer=services.tokenizer,
        model=model,
        created=int(time.time()),
        with_logprobs=bool(body.logprobs),
        with_usage=body.reports_usage,
        with_usage_so_far=body.reports_usage_continuously,
        with_timings=body.timings_per_token,
        with_token_ids=body.return_token_ids,
        with_prompt_logprobs=body.prompt_logprobs is not None,
        with_reasoning=body.include_reasoning,
    )
    return await answer(request, writer, services, stream=bool(body.stream))


def chat_task(body: ChatCompletionRequest) -> ChatTask:
    """Translates a request for a chat completion into a `ChatTask`, which does not depend on the API."""
    mode, allowed = mode_and_allowed(body.tool_choice)
    return ChatTask(
        messages=tuple(message.to_template() for message in body.messages),
        body=body,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        tools=declared_tools(body.tools),
        tool_choice=mode,
        allowed_tools=allowed,
        # As in OpenAI's API, a named function is called exactly once.
        parallel_tool_calls=body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool),
        output_format=body.output_format,
        reasoning_effort=body.reasoning_effort,
        thinking_token_budget=body.thinking_token_budget,
        documents=tuple(body.documents or ()),
        chat_template=body.chat_template or None,
        template_kwargs=body.chat_template_kwargs or {},
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
    )


def declared_tools(tools: Tools | None) -> tuple[Tool, ...]:
    """Returns those tools of a request that have the type "function"."""
    return tuple(
        Tool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or {},
            strict=bool(tool.function.strict),
            param=f"tools.{position}.function.parameters",
        )
        for position, tool in enumerate(tools or ())
        if isinstance(tool, FunctionTool)
    )


def warn_of_other_tools(tools: Tools | None, scope: Scope) -> None:
    """If the request has tools of types that this server does not support, adds the header X-Warning, which lists these
    types, to the reply."""
    types = dict.fromkeys(tool.type for tool in tools or () if isinstance(tool, OtherTool))
    if types:
        warn(f"tools of other types than function were left out: {', '.join(types)}", scope)
