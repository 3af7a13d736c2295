"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from jamba_server.server.http.schemas.base import (
    FinishReason,
    GenerationBody,
    NotYet,
    Reply,
    TokenId,
    TopLogprobs,
    Usage,
    invalid,
    within,
)

MAX_PROMPTS = 1024
MAX_REQUEST_CHOICES = 1024  # prompts x n

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind(value: object) -> str | None:
    """Which of the four shapes of a prompt is meant; the first element of a list decides."""
    if isinstance(value, str):
        return "(string)"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "(strings)" if isinstance(first, str) else "(id lists)" if isinstance(first, list) else "(ids)"


Prompt = Annotated[
    Annotated[str, Tag("(string)")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(strings)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(id lists)")],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(GenerationBody):
    """OpenAI's completion with vLLM's extra fields. `max_tokens` 0 with `echo` scores the prompt."""

    prompt: Prompt
    max_tokens: Annotated[int, within("max_tokens")] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool = True

    suffix: NotYet = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        n = self.n or 1
        if self.max_tokens == 0 and not self.echo:
            raise invalid("At least 1; 0 is only allowed with `echo`.", field="max_tokens")
        if self.best_of is not None and self.best_of != n:
            raise invalid(f"Choosing among more replies than `n` ({n}) is not supported.", field="best_of")
        if (num_choices := n * len(self.prompts)) > MAX_REQUEST_CHOICES:
            why = f"{len(self.prompts)} prompts and n = {n} make {num_choices} choices; at most {MAX_REQUEST_CHOICES}."
            raise invalid(why, field="n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_]:
                return [self.prompt]  # pyright: ignore[reportReturnType] - a list's first element decides for all
            case prompts:
                return prompts  # pyright: ignore[reportReturnType]


class CompletionLogprobs(Reply):
    """Parallel lists, one entry a token. The first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """`stop_reason`: the stop string or the id in `stop_token_ids` that ended the choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Completion(Reply):
    """The reply, and one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
