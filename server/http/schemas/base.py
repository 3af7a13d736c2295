"""What the requests and replies of all endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, LiteralString, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.engine.errors import NotSupportedYet
from jamba_server.engine.validation import INT32_MAX, MAX_LOGIT_BIAS_ENTRIES, MAX_STOP_TOKEN_IDS, RANGES

MAX_CHOICES = 128  # of one prompt
MAX_STOPS = 4


def within(field: str, *, low: float | None = None, description: str | None = None) -> Any:
    """The range of a sampling parameter, as the engine states it; `low` takes the place of its lower end."""
    bounds = RANGES[field]
    if bounds.open:
        return Field(gt=bounds.low, le=bounds.high, description=description)
    return Field(ge=bounds.low if low is None else low, le=bounds.high, description=description)


def invalid(why: str, *, field: str, kind: LiteralString = "invalid") -> PydanticCustomError:
    """An error of a validator that sees a whole object, about one field of it."""
    return PydanticCustomError(kind, "{why}", {"why": why, "field": field})


class RequestBody(BaseModel):
    """Base of everything that clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        # pydantic's own check makes one error for every unknown field; the first one is enough
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise invalid("Unknown field; it is not part of this API.", field=str(name), kind="unknown_field")
        return data


class Reply(BaseModel):
    """Base of everything that the server sends."""

    model_config = ConfigDict(frozen=True)


def not_yet(feature: str) -> PydanticCustomError:
    return PydanticCustomError("not_supported_yet", "{why}", {"why": str(NotSupportedYet(feature))})


def _refuse(value: object, info: ValidationInfo) -> None:
    if value not in (None, [], ""):
        raise not_yet(f"`{info.field_name}`")


# A field of the API that this server knows but does not have yet: null or empty (no tools, no annotations), or refused
# by name.
NotYet = Annotated[None, BeforeValidator(_refuse)]


def _only_text(value: object) -> object:
    if isinstance(value, dict) and value.get("type") != "text":
        raise not_yet(f"`response_format` of type {str(value.get('type'))[:32]!r}")
    return value


class TextFormat(RequestBody):
    type: Literal["text"]


ResponseFormat = Annotated[TextFormat | None, BeforeValidator(_only_text)]


def string_or_list(value: object) -> str | None:
    """Which member of a union of a string and a list is meant; the tags are not part of an error's path."""
    return "(string)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("(string)")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="stop_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]


def _token_ids(value: object) -> object:
    """JSON has only strings as keys; those of `logit_bias` are token ids."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("token_id", 'Keys should be token ids, like "2"') from None


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, within("logit_bias")]],
    Field(max_length=MAX_LOGIT_BIAS_ENTRIES),
    BeforeValidator(_token_ids),
]


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: Annotated[bool | None, Field(description="vLLM's: usage so far in every event")] = None
    include_obfuscation: Literal[False] | None = None


class NoEffect(RequestBody):
    """Fields of OpenAI's specification that change nothing here: their meaning is a service around the model.

    This is the only place where fields are accepted and not used.
    """

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # a hint for routing between machines


class GenerationBody(NoEffect):
    """Fields that chats and completions share. None is the model's default (`generation_config.json`)."""

    model: Annotated[str, Field(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, within("seed")] | None = None
    stop: Stop | None = None
    temperature: Annotated[float, within("temperature")] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, within("frequency_penalty")] | None = None
    logit_bias: LogitBias | None = None

    # vLLM's
    top_k: Annotated[int, within("top_k", low=-1, description="0 or -1: all")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    repetition_penalty: Annotated[float, within("repetition_penalty")] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, within("min_tokens")] = 0
    skip_special_tokens: bool = True
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31, description="lower runs first; --enable-priority")] | None = (
        None
    )

    response_format: ResponseFormat = None
    structured_outputs: NotYet = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """null is the default, also where that is a number or a bool."""
        if not isinstance(data, dict):
            return data
        fields = cast("dict[str, Any]", data)
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("Only allowed with `stream`: true.", field="stream_options")
        return self

    @property
    def reports_usage(self) -> bool:
        """Of streams: whether the tokens are counted at the end."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def reports_usage_continuously(self) -> bool:
        return self.reports_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class PromptTokensDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    """Tokens of one HTTP request. A prompt counts once, whatever `n`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorReply(Reply):
    error: ErrorDetail


FinishReason = Literal["stop", "length", "abort"]
TopLogprobs = Annotated[int, within("logprobs")]
