"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.choice import ChoiceDelta, TextOptions, TokenScore
from jamba_server.server.http.errors import request_id_of
from jamba_server.server.http.generation import Generation, GenerationSpec, Prompt
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.sampling import admit_prompt, check_priority, sampling_params
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.http.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import ACCEPTED, EventStream, event, until_disconnect
from jamba_server.server.text.tokenizer import Tokenizer

router = APIRouter(tags=["generation"])

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Continuations of one or several prompts; with `stream` as server-sent events of the same object."""
    await services.admit(request, num_choices=len(body.prompts) * (body.n or 1))
    writer = _Writer(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.model(body.model),
        tokenizer=services.tokenizer,
        with_logprobs=body.logprobs is not None,
        with_usage=body.reports_usage,
        with_usage_so_far=body.reports_usage_continuously,
    )
    generation = services.generation(await _spec(body, services, writer.id, request_id_of(request.scope)))
    if body.stream:
        return EventStream(writer.events(generation), keep_alive=services.config.sse_keep_alive)
    choices = await until_disconnect(request.receive, generation.collect())
    if writer.with_logprobs:  # A long reply has tens of thousands of token texts.
        return await services.in_thread(lambda: json_response(writer.reply(choices, generation)))
    return json_response(writer.reply(choices, generation))


async def _spec(body: CompletionRequest, services: Services, id_: str, http_request_id: str) -> GenerationSpec:
    priority = check_priority(body.priority, enabled=services.config.enable_priority)
    text = TextOptions(
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        echo=bool(body.echo),
    )
    return GenerationSpec(
        id=id_,
        prompts=tuple([await _prompt(body, services, prompt) for prompt in body.prompts]),
        n=body.n or 1,
        text=text,
        priority=priority,
        http_request_id=http_request_id,
    )


async def _prompt(body: CompletionRequest, services: Services, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        services.check_size(prompt, param="prompt")
        prompt = await services.encode(prompt, add_special_tokens=body.add_special_tokens)
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        seed=services.draw_seed(),  # one a prompt, or equal prompts would have equal replies
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return admit_prompt(prompt, params, services.engine, param="prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Deltas as OpenAI's objects."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    with_logprobs: bool
    with_usage: bool
    with_usage_so_far: bool

    def reply(self, choices: list[ChoiceDelta], generation: Generation) -> Completion:
        return self._completion([self._choice(choice) for choice in choices], generation.usage)

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        async with generation.run() as deltas:
            yield ACCEPTED
            async for delta in deltas:
                chunk = self._completion([self._choice(delta)], generation.usage if self.with_usage_so_far else None)
                yield event(chunk, exclude=None if self.with_usage else {"usage"})
        if self.with_usage:
            yield event(self._completion([], generation.usage))

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.scores) if self.with_logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def _logprobs(self, scores: Sequence[TokenScore]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self.tokenizer.token_text(score.token_id) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[self._top(score) for score in scores],
            text_offset=[score.offset for score in scores],
        )

    def _top(self, score: TokenScore) -> dict[str, float] | None:
        """The most likely tokens, best first, and always the token itself. Of tokens that look alike, the best one."""
        if score.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self.tokenizer.token_text(token_id), logprob)
        return top
