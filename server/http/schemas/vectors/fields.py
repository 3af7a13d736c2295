"""The fields that the requests and replies for vectors share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from jamba_server.server.http.schemas.base import (
    CacheSalt,
    NullableBody,
    Priority,
    PromptTokensDetails,
    Reply,
    Timeout,
    TokenId,
)

MAX_INPUTS = 2048  # maximum number of inputs in a request, as in OpenAI's API

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]


def _kind(value: Any) -> str | None:
    """Returns the tag that tells pydantic which of the four forms of an input to validate. The first element of a list
    decides the form of the list."""
    if isinstance(value, str):
        return "(string)"
    if not isinstance(value, list):
        return None
    first: Any = value[0] if value else ""
    return "(strings)" if isinstance(first, str) else "(id lists)" if isinstance(first, list) else "(ids)"


Input = Annotated[
    Annotated[Text, Tag("(string)")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("(strings)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("(id lists)")],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]

UseActivation = Annotated[
    bool,
    Field(
        description="Divide an embedding by its length, and turn a classifier's outputs into probabilities. false "
        "returns the model's own numbers."
    ),
]


class VectorBody(NullableBody):
    """The fields that all requests for vectors have in common."""

    model: Annotated[
        Annotated[str, Field(max_length=512)] | None,
        Field(description="One of the names that /v1/models lists. Default: the first of them."),
    ] = None
    user: Annotated[str | None, Field(description="The client's name for its user. It has no effect.")] = None
    cache_salt: CacheSalt = None
    priority: Priority = None
    timeout: Timeout = None


class InputBody(VectorBody):
    """A request with inputs of which each gets a vector."""

    input: Annotated[
        Input,
        Field(description=f"A text or a list of token ids, or up to {MAX_INPUTS:,} of them in a list."),
    ]
    add_special_tokens: Annotated[
        bool, Field(description="Put the begin-of-text token before an input that is a text.")
    ] = True

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        match self.input:
            case str() as text:
                return [text]
            case [int(), *_]:
                # pydantic has checked that all elements of the list have the same type as its first element.
                return [self.input]  # pyright: ignore[reportReturnType]
            case inputs:
                return inputs  # pyright: ignore[reportReturnType]


class VectorUsage(Reply):
    """The token counts of a request without generated tokens."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(num_tokens: int, num_cached: int) -> VectorUsage:
    details = PromptTokensDetails(cached_tokens=num_cached)
    return VectorUsage(prompt_tokens=num_tokens, total_tokens=num_tokens, prompt_tokens_details=details)
