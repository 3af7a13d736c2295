"""The route POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.server.http.choice import TextOptions
from jamba_server.server.http.errors import request_id_of, tenant_of
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.routes.admission import wait_for_start
from jamba_server.server.http.routes.replies import ERRORS
from jamba_server.server.http.sampling import admit_prompt, check_priority, sampling_params
from jamba_server.server.http.schemas.chat import ChatCompletion, ChatCompletionRequest
from jamba_server.server.http.services import Services, ServicesOf
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
    spec = await _spec(body, services, f"chatcmpl-{uuid.uuid4().hex}", request.scope)
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


async def _spec(body: ChatCompletionRequest, services: Services, id_: str, scope: Scope) -> GenerationSpec:
    context = services.engine.info.max_model_len
    priority = check_priority(body.priority, enabled=services.config.enable_priority)
    chat = await services.render(body.messages, add_generation_prompt=body.add_generation_prompt)
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=body.reply_limit(default=context, context=context),
        seed=services.draw_seed(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        bad_words=await services.bad_words(body.bad_words),
    )
    prompt = admit_prompt(
        chat.prompt_ids, params, services.engine, param="messages", save_positions=chat.save_positions
    )
    text = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        strip_leading_space=chat.strip_leading_space,
    )
    return GenerationSpec(
        id=id_,
        prompts=(prompt,),
        n=body.n or 1,
        text=text,
        priority=priority,
        cache_salt=body.cache_salt or "",
        tenant=tenant_of(scope),
        http_request_id=request_id_of(scope),
    )
