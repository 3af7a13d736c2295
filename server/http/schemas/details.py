"""The request fields that add data to the replies of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from jamba_server.server.http.schemas.base import GenerationBody, TopLogprobs, invalid


class DetailedBody(GenerationBody):
    """The request fields that /v1/chat/completions and /v1/completions have in common and that the Responses and
    Messages APIs do not have."""

    prompt_logprobs: Annotated[
        TopLogprobs | None,
        Field(
            description="Return the log-probabilities of the prompt's tokens, and this number of most likely tokens "
            "per position. Not allowed with `stream`."
        ),
    ] = None
    return_token_ids: Annotated[bool, Field(description="Return the token ids of the prompt and of the reply.")] = False
    timings_per_token: Annotated[
        bool, Field(description="llama.cpp's field: the reply, or the last event of a stream, has the field `timings`.")
    ] = False

    @model_validator(mode="after")
    def _check_details(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("is not allowed with `stream`: true", field="prompt_logprobs")
        return self
