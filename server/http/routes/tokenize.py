"""POST /tokenize and POST /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.models import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from jamba_server.server.http.services import Services, ServicesOf

router = APIRouter(tags=["text"])


@router.post("/tokenize", response_model=TokenizeReply, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request, services: ServicesOf) -> Response:
    """The token ids of a prompt or of a conversation as the model reads it."""
    await services.startup.wait(request.receive, 1)
    services.model(body.model)
    tokens = await _tokens(body, services)
    return json_response(
        TokenizeReply(
            count=len(tokens),
            max_model_len=services.engine.info.max_model_len,
            tokens=tokens,
            token_strs=[services.tokenizer.token_text(id_) for id_ in tokens] if body.return_token_strs else None,
        )
    )


async def _tokens(body: TokenizeRequest, services: Services) -> list[int]:
    if body.messages is not None:
        chat = await services.render(body.messages, add_generation_prompt=body.add_generation_prompt)
        return chat.prompt_ids
    assert body.prompt is not None, "the schema wants one of the two"
    return await services.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)


@router.post("/detokenize", response_model=DetokenizeReply, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, services: ServicesOf) -> Response:
    """The text of token ids, special tokens included."""
    services.model(body.model)
    vocab_size = services.tokenizer.vocab_size
    if (unknown := next((id_ for id_ in body.tokens if id_ >= vocab_size), None)) is not None:
        raise RequestRejected(f"tokens has id {unknown}; ids are 0 to {vocab_size - 1}.", param="tokens")
    return json_response(DetokenizeReply(prompt=services.tokenizer.decode(body.tokens, skip_special_tokens=False)))
