"""The request and the reply of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import (
    FinishReason,
    PromptLogprobs,
    Reply,
    Timings,
    TokenId,
    TopLogprobs,
    Usage,
    if_any,
    invalid,
    unsupported,
)
from jamba_server.server.http.schemas.cache_report import JambaCache
from jamba_server.server.http.schemas.details import DetailedBody
from jamba_server.server.http.schemas.formats import FormatFields

MAX_PROMPTS = 1024
MAX_REQUEST_CHOICES = 1024  # maximum number of choices in a request: number of prompts multiplied by `n`

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind(value: object) -> str | None:
    """Returns the tag that tells pydantic which of the four forms of a prompt to validate.

    The forms are a string, a list of strings, a list of token ids and a list of lists of token ids. The form of a list
    is decided by its first element.
    """
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
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(FormatFields, DetailedBody):
    """A request for a completion, with OpenAI's fields and vLLM's extra ones.

    If a request has `echo`, `logprobs` and a `max_tokens` of 0, the reply has only the prompt and the log-probabilities
    of the prompt's tokens.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.7}]}
    )

    peers = peer_fields.COMPLETION

    prompt: Annotated[
        Prompt,
        Field(description="A text or a list of token ids that the model continues, or a list of such prompts."),
    ]
    echo: Annotated[bool | None, Field(description="Put the prompt before the reply.")] = None
    logprobs: Annotated[
        TopLogprobs | None,
        Field(description="Return the tokens' log-probabilities, and this number of most likely tokens per position."),
    ] = None
    best_of: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Must be equal to `n`. Choosing the best of more replies is not supported."),
    ] = None
    add_special_tokens: Annotated[
        bool, Field(description="Put the begin-of-text token before a prompt that is a text.")
    ] = True
    suffix: Annotated[
        str | None, unsupported(""), Field(description="The text that follows the reply. Not supported yet.")
    ] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        n = self.n or 1
        for field in ("max_tokens", "max_completion_tokens"):
            if getattr(self, field) == 0 and not self.echo:
                raise invalid("is 0, which is only allowed with `echo`; it must be at least 1", field=field)
        if self.best_of is not None and self.best_of != n:
            why = f"is {self.best_of}; choosing among more replies than `n`, which is {n}, is not supported"
            raise invalid(why, field="best_of")
        if self.echo and self.prompt_logprobs is not None and self.prompt_logprobs != self.logprobs:
            why = "is only allowed with `echo` if `logprobs` has the same value"
            raise invalid(why, field="prompt_logprobs")
        if (num_choices := n * len(self.prompts)) > MAX_REQUEST_CHOICES:
            why = f"is {n}, so that all prompts have {num_choices} choices; at most {MAX_REQUEST_CHOICES} are allowed"
            raise invalid(why, field="n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_]:
                # pydantic has checked that all elements of the list have the same type as its first element.
                return [self.prompt]  # pyright: ignore[reportReturnType]
            case prompts:
                return prompts  # pyright: ignore[reportReturnType]


class CompletionLogprobs(Reply):
    """Lists of the tokens and their log-probabilities, with one entry for each token. The first token of an echoed
    prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One choice of a reply. `stop_reason` is the stop string, or the id in `stop_token_ids`, that ended the choice.

    The last three fields are sent only if the request asks for them. In a stream, the first event of a choice has
    `prompt_token_ids`.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: Annotated[list[int] | None, if_any] = None
    prompt_token_ids: Annotated[list[int] | None, if_any] = None
    prompt_logprobs: Annotated[PromptLogprobs | None, if_any] = None


class Completion(Reply):
    """The whole reply of /v1/completions, or one event of a stream. Both have the same fields."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Annotated[Timings | None, if_any] = None
    jamba_cache: Annotated[JambaCache | None, if_any] = None
