"""The routes POST /tokenize, POST /detokenize and GET /tokenizer_info. Requests and replies have vLLM's fields."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.chat_task import ChatTask, render_task
from jamba_server.server.http.routes.admission import prepared, wait_for_start
from jamba_server.server.http.routes.chat import declared_tools, warn_of_other_tools
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.models import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfoReply,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.unknown_fields import settle_unknown_fields, warn_of_bos

router = APIRouter(tags=["text"])

# The class of Hugging Face transformers that can load the file tokenizer.json of any model.
TOKENIZER_CLASS: Final = "PreTrainedTokenizerFast"


@router.post("/tokenize", response_model=TokenizeReply, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the token ids that the model would read for a prompt or a conversation."""
    settle_unknown_fields(body, request, services)
    if body.prompt is not None and services.begins_with_bos(body.prompt):
        warn_of_bos(request, services)
    await wait_for_start(request, services)
    services.model(body.model)
    warn_of_other_tools(body.tools, request.scope)
    tokens = await prepared(request, _tokens(body, services, request.scope))
    if body.return_token_strs:
        _check_number(len(tokens), services, param="return_token_strs")

    def reply() -> Response:
        text = services.tokenizer.token_text
        strs = [text(id_) for id_ in tokens] if body.return_token_strs else None
        limit = services.engine.info.max_model_len
        return json_response(TokenizeReply(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=strs))

    return await services.in_thread(reply)


async def _tokens(body: TokenizeRequest, services: Services, scope: Scope) -> list[int]:
    if body.messages is not None:
        task = ChatTask(
            messages=tuple(message.to_template() for message in body.messages),
            body=GenerationBody(),
            tools=declared_tools(body.tools),
            reasoning_effort=body.reasoning_effort,
            documents=tuple(body.documents or ()),
            chat_template=body.chat_template or None,
            template_kwargs=body.chat_template_kwargs or {},
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
        )
        return (await render_task(task, services, scope)).prompt_ids
    assert body.prompt is not None, "the schema requires either messages or prompt"
    special = services.tokenizer.special_tokens.get(body.prompt)
    if special is not None and body.add_special_tokens is False:
        return [special]  # the tool lm-eval tokenises the text of the end-of-text token to learn its id
    services.check_size(body.prompt, param="prompt")
    return await services.encode_prompt(body.prompt, add_special_tokens=body.add_special_tokens is not False)


@router.post("/detokenize", response_model=DetokenizeReply, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the text of token ids, special tokens included. The number of ids must not exceed the context length."""
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    services.model(body.model)
    _check_number(len(body.tokens), services, param="tokens")

    def reply() -> Response:
        vocab_size = services.tokenizer.vocab_size
        if (unknown := next((id_ for id_ in body.tokens if id_ >= vocab_size), None)) is not None:
            raise RequestRejected(
                f"tokens has the id {unknown}; it must be from 0 to {vocab_size - 1}.", param="tokens"
            )
        return json_response(DetokenizeReply(prompt=services.tokenizer.decode(body.tokens, skip_special_tokens=False)))

    return await services.in_thread(reply)


def _check_number(number: int, services: Services, *, param: str) -> None:
    limit = services.engine.info.max_model_len
    if number > limit:
        raise RequestRejected(
            f"This model's maximum context length is {limit} tokens; this request is for the text of {number} tokens.",
            param=param,
            code="context_length_exceeded",
        )


@router.get("/tokenizer_info", response_model=TokenizerInfoReply, responses=ERRORS)
async def tokenizer_info(request: Request, services: ServicesOf) -> Response:
    """Returns the texts and ids of the special tokens, and the chat template. The vocabulary is not included."""
    await wait_for_start(request, services)
    tokenizer, template = services.tokenizer, services.chat_template
    named = tokenizer.named_tokens
    return json_response(
        TokenizerInfoReply(
            tokenizer_class=TOKENIZER_CLASS,
            model_max_length=services.engine.info.max_model_len,
            vocab_size=tokenizer.vocab_size,
            bos_token=named.get("bos_token"),
            eos_token=named.get("eos_token"),
            unk_token=named.get("unk_token"),
            pad_token=named.get("pad_token"),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            chat_template=template.source if template is not None else None,
        )
    )
