"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.http.choice import ChoiceDelta, TextOptions, TokenScore
from jamba_server.server.http.errors import request_id_of
from jamba_server.server.http.generation import Generation, GenerationSpec
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.sampling import admit_prompt, check_priority, sampling_params
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.http.schemas.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    ReplyMessage,
    TokenLogprob,
    TopLogprob,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import EventStream, event, until_disconnect
from jamba_server.server.text.tokenizer import Tokenizer

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesOf) -> Response:
    """The next message of a conversation; with `stream` as server-sent events of `chat.completion.chunk`."""
    await services.admit(request, num_choices=body.n or 1)
    writer = _Writer(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=services.model(body.model),
        tokenizer=services.tokenizer,
        with_logprobs=bool(body.logprobs),
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


async def _spec(body: ChatCompletionRequest, services: Services, id_: str, http_request_id: str) -> GenerationSpec:
    priority = check_priority(body.priority, enabled=services.config.enable_priority)
    chat = await services.render(body.messages)
    params = sampling_params(
        body,
        services.defaults,
        max_tokens=body.max_completion_tokens or body.max_tokens or services.engine.info.max_model_len,
        seed=services.draw_seed(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
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
        id=id_, prompts=(prompt,), n=body.n or 1, text=text, priority=priority, http_request_id=http_request_id
    )


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

    def reply(self, choices: list[ChoiceDelta], generation: Generation) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=ReplyMessage(content=choice.text),
                    logprobs=self._logprobs(choice.scores),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for choice in choices
            ],
            usage=generation.usage,
        )

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The role of every choice at once, so that a client sees that its request runs; then text as it comes."""
        async with generation.run() as deltas:
            for index in range(generation.num_choices):
                yield self._event(ChunkChoice(index=index, delta=Delta(role="assistant", content="")), generation)
            async for delta in deltas:
                for choice in self._chunk_choices(delta):
                    yield self._event(choice, generation)
        if self.with_usage:
            yield event(self._chunk([], generation.usage))

    def _chunk_choices(self, delta: ChoiceDelta) -> Iterable[ChunkChoice]:
        """Text and log-probabilities if there are some, and the finish reason on its own."""
        if delta.text or delta.scores:
            content = Delta(content=delta.text)
            yield ChunkChoice(index=delta.index, delta=content, logprobs=self._logprobs(delta.scores))
        if delta.finish_reason:
            yield ChunkChoice(
                index=delta.index, delta=Delta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
            )

    def _event(self, choice: ChunkChoice, generation: Generation) -> bytes:
        chunk = self._chunk([choice], generation.usage if self.with_usage_so_far else None)
        return event(chunk, exclude=None if self.with_usage else {"usage"})

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _logprobs(self, scores: Iterable[TokenScore]) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return ChatLogprobs(content=[self._token_logprob(score) for score in scores])

    def _token_logprob(self, score: TokenScore) -> TokenLogprob:
        assert score.logprob is not None, "only echoed prompts have tokens without one"
        return TokenLogprob(
            token=self.tokenizer.token_text(score.token_id),
            logprob=score.logprob,
            bytes=list(self.tokenizer.token_bytes(score.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=self.tokenizer.token_text(token_id),
                    logprob=logprob,
                    bytes=list(self.tokenizer.token_bytes(token_id)),
                )
                for token_id, logprob in score.top
            ],
        )
