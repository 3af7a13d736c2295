"""The route POST /v1/completions."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.cache_use import cache_salt, cache_use
from jamba_server.server.http.choice import TextOptions
from jamba_server.server.http.deadlines import set_timeout, time_limit_of
from jamba_server.server.http.errors import progress_hook, request_id_of, tenant_of
from jamba_server.server.http.generation import GenerationSpec, Prompt
from jamba_server.server.http.routes.admission import prepared, require, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, STREAM
from jamba_server.server.http.sampling import admit_prompt, engine_priority, sampling_params
from jamba_server.server.http.schemas.completions import Completion, CompletionRequest
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.unknown_fields import settle_unknown_fields, warn_of_bos
from jamba_server.server.http.writers.completions import CompletionWriter

router = APIRouter(tags=["generation"])

DEFAULT_MAX_TOKENS = 16  # default of a completion's `max_tokens`, as in OpenAI's API


@router.post("/v1/completions", response_model=Completion, responses=STREAM | ERRORS)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the continuations of one or several prompts. With `stream`, they are sent as `text_completion` events."""
    services.lifecycle.admit()
    set_timeout(request.scope, body.timeout)
    settle_unknown_fields(body, request, services)
    if any(isinstance(prompt, str) and services.begins_with_bos(prompt) for prompt in body.prompts):
        warn_of_bos(request, services)
    await wait_for_start(request, services, num_choices=len(body.prompts) * (body.n or 1))
    require(services, "generate")
    model = services.model(body.model)
    spec = await prepared(request, _spec(body, services, f"cmpl-{uuid.uuid4().hex}", request.scope))
    writer = CompletionWriter(
        generation=services.generation(spec),
        tokenizer=services.tokenizer,
        model=model,
        created=int(time.time()),
        with_logprobs=body.logprobs is not None,
        with_usage=body.reports_usage,
        with_usage_so_far=body.reports_usage_continuously,
        with_timings=body.timings_per_token,
        with_token_ids=body.return_token_ids,
        with_prompt_logprobs=body.prompt_logprobs is not None,
    )
    return await answer(request, writer, services, stream=bool(body.stream))


async def _spec(body: CompletionRequest, services: Services, id_: str, scope: Scope) -> GenerationSpec:
    priority = engine_priority(body.priority, scope, enabled=services.config.enable_priority)
    if body.cache is not None and body.cache.explain and len(body.prompts) > 1:
        raise RequestRejected(
            f"cache.explain is true, but there are {len(body.prompts)} prompts; an explanation is for one.",
            param="cache",
        )
    bad_words = await services.bad_words(body.bad_words)
    grammar = (await services.grammar(scope, body.output_format)).text
    text = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        echo=bool(body.echo),
    )
    return GenerationSpec(
        id=id_,
        prompts=tuple([await _prompt(body, services, prompt, bad_words, grammar) for prompt in body.prompts]),
        n=body.n or 1,
        text=text,
        priority=priority,
        cache_salt=cache_salt(body.cache_salt, tenant_of(scope), services.config),
        cache=cache_use(body),
        tenant=tenant_of(scope),
        time_limit=time_limit_of(scope),
        http_request_id=request_id_of(scope),
        on_progress=progress_hook(scope),
    )


async def _prompt(
    body: CompletionRequest,
    services: Services,
    prompt: str | list[int],
    bad_words: tuple[tuple[int, ...], ...],
    grammar: str,
) -> Prompt:
    if isinstance(prompt, str):
        services.check_size(prompt, param="prompt")
        prompt = await services.encode_prompt(prompt, add_special_tokens=body.add_special_tokens)
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=body.reply_limit(default=DEFAULT_MAX_TOKENS, context=services.engine.info.max_model_len),
        seed=services.draw_seed(),  # a seed for each prompt; with a common seed, equal prompts would get equal replies
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else body.prompt_logprobs,
        bad_words=bad_words,
        grammar=grammar,
    )
    return admit_prompt(prompt, params, services.engine, param="prompt")
