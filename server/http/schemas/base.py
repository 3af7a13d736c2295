"""What the requests and replies of all endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, LiteralString, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.engine.errors import NotSupportedYet
from jamba_server.engine.validation import (
    INT32_MAX,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_STOP_TOKEN_IDS,
    RANGES,
)
from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.unknown import nearest, peer_problem

MAX_CHOICES = 128  # of one prompt
MAX_STOPS = 64  # the search for them takes time in proportion
MAX_BAD_WORDS = 64
MAX_CACHE_SALT_CHARS = 128


def within(field: str, *, low: float | None = None) -> Any:
    """The range of a sampling parameter, as the engine states it; `low` takes the place of its lower end."""
    bounds = RANGES[field]
    if bounds.open:
        return Field(gt=bounds.low, le=bounds.high)
    return Field(ge=bounds.low if low is None else low, le=bounds.high)


def invalid(why: str, *, field: str, kind: LiteralString = "invalid") -> PydanticCustomError:
    """An error of a validator that sees a whole object, about one field of it. `why` goes on with a sentence that
    begins with the field's name."""
    return PydanticCustomError(kind, "{why}", {"why": why, "field": field})


class RequestBody(BaseModel):
    """Base of everything that clients send. Fields that are not in a schema stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    peers: ClassVar[peer_fields.PeerFields] = peer_fields.NONE

    @model_validator(mode="before")
    @classmethod
    def _check_unknown(cls, data: Any) -> Any:
        """Refuses what changes the answer and what looks like a slip; the rest is for the server's settings."""
        if not isinstance(data, dict):
            return data
        body = cast("dict[str, Any]", data)
        for name in body:
            if name in cls.model_fields:
                continue
            if (why := peer_problem(name, body, cls.peers)) is not None:
                raise invalid(why, field=name, kind="not_supported_yet")
            if name not in cls.peers and (known := nearest(name, cls.model_fields)) is not None:
                why = f"is not a field of this API; did you mean `{known}`?"
                raise invalid(why, field=name, kind="unknown_field")
        return body


class Reply(BaseModel):
    """Base of everything that the server sends."""

    model_config = ConfigDict(frozen=True)


def not_yet(feature: str = "") -> PydanticCustomError:
    """`feature` is what the sentence goes on with, if it is not about the field itself."""
    why = f"has {NotSupportedYet(feature)}" if feature else "is not supported yet"
    return PydanticCustomError("not_supported_yet", "{why}", {"why": why.removesuffix(".")})


def unsupported(*neutral: object) -> BeforeValidator:
    """A field of the API that this server knows but does not have yet: null, or a value that asks for nothing, or
    refused by name."""

    def refuse(value: object) -> object:
        if value is not None and value not in neutral:
            raise not_yet()
        return value

    return BeforeValidator(refuse)


def _only_text(value: object) -> object:
    if isinstance(value, dict) and value.get("type") != "text":
        raise not_yet(f"the type {str(value.get('type'))[:32]!r}, which")
    return value


class TextFormat(RequestBody):
    """Plain text, the only format so far."""

    type: Annotated[Literal["text"], Field(description='Always "text".')]


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
        custom_error_message="must be a string or a list of strings",
    ),
]


def _token_ids(value: object) -> object:
    """JSON has only strings as keys; those of `logit_bias` are token ids."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("token_id", 'must have token ids as keys, like "2"') from None


def _not_blank(value: object) -> object:
    if isinstance(value, str) and value and not value.strip(" "):
        raise PydanticCustomError("blank", "has nothing but spaces; a word needs another character")
    return value


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, within("logit_bias")]],
    Field(max_length=MAX_LOGIT_BIAS_ENTRIES),
    BeforeValidator(_token_ids),
]
BadWord = Annotated[str, Field(min_length=1, max_length=256), BeforeValidator(_not_blank)]
# -1 is no limit, as clients of llama.cpp say it
TokenLimit = Annotated[int, within("max_tokens", low=-1)]


class StreamOptions(RequestBody):
    """What the events of a stream carry."""

    include_usage: Annotated[
        bool | None, Field(description="Send one more event at the end, with the token counts.")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="vLLM's: with `include_usage`, the counts so far in every event.")
    ] = None
    include_obfuscation: Annotated[
        Literal[False] | None, Field(description="Padding against traffic analysis; this server has none.")
    ] = None


class NoEffect(RequestBody):
    """Fields of OpenAI's specification that change nothing here: their meaning is a service around the model."""

    user: Annotated[str | None, Field(description="The client's name for its user; changes nothing.")] = None
    metadata: Annotated[dict[str, str] | None, Field(description="The client's own notes; change nothing.")] = None
    store: Annotated[bool | None, Field(description="Nothing is stored, whatever this says.")] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None,
        Field(description="There is one tier; changes nothing."),
    ] = None
    safety_identifier: Annotated[str | None, Field(description="The client's name for its user; changes nothing.")] = (
        None
    )
    prompt_cache_key: Annotated[
        str | None, Field(description="A hint for routing between machines; changes nothing.")
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None, Field(description="vLLM's, for slow tokenizers; changes nothing here.")
    ] = None


class GenerationBody(NoEffect):
    """Fields that chats and completions share. None is the model's default (`generation_config.json`)."""

    model: Annotated[
        Annotated[str, Field(max_length=512)] | None,
        Field(description="A served name, as /v1/models lists them; null: the first of them."),
    ] = None
    n: Annotated[
        Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None, Field(description="Choices for each prompt; null: 1.")
    ] = None
    stream: Annotated[bool | None, Field(description="Send the reply as server-sent events, as it comes.")] = None
    stream_options: Annotated[
        StreamOptions | None, Field(description="What the events of a stream carry; only with `stream`.")
    ] = None
    seed: Annotated[
        Annotated[int, within("seed")] | None,
        Field(description="The same seed, prompt and parameters give the same reply; null: a random one."),
    ] = None
    stop: Annotated[Stop | None, Field(description=f"A string that ends the reply, or up to {MAX_STOPS} of them.")] = (
        None
    )
    temperature: Annotated[
        Annotated[float, within("temperature")] | None,
        Field(description="How much chance there is in the choice of tokens; 0: always the most likely one."),
    ] = None
    top_p: Annotated[
        Annotated[float, within("top_p")] | None,
        Field(description="Choose among the fewest tokens whose probabilities add up to this; 1: among all."),
    ] = None
    presence_penalty: Annotated[
        Annotated[float, within("presence_penalty")] | None,
        Field(description="Subtracted from the logits of tokens that the reply has already."),
    ] = None
    frequency_penalty: Annotated[
        Annotated[float, within("frequency_penalty")] | None,
        Field(description="Subtracted from a token's logit for each time that the reply has it."),
    ] = None
    logit_bias: Annotated[
        LogitBias | None, Field(description="Token ids, as strings, with what is added to their logits.")
    ] = None

    # vLLM's
    top_k: Annotated[
        Annotated[int, within("top_k", low=-1)] | None,
        Field(description="Choose among so many of the most likely tokens; 0 or -1: among all."),
    ] = None
    min_p: Annotated[
        Annotated[float, within("min_p")] | None,
        Field(description="Choose among tokens with at least this share of the best one's probability."),
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, within("repetition_penalty")] | None,
        Field(description="Divides the positive logits, and multiplies the negative ones, of tokens that occurred."),
    ] = None
    stop_token_ids: Annotated[
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None,
        Field(description="Tokens that end the reply, beside the model's own."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool, Field(description="Keep the stop string or stop token in the text.")
    ] = False
    ignore_eos: Annotated[bool, Field(description="Go on after the model's end token.")] = False
    min_tokens: Annotated[
        int, within("min_tokens"), Field(description="So many tokens come before the reply may end.")
    ] = 0
    skip_special_tokens: Annotated[bool, Field(description="Leave special tokens out of the text.")] = True
    bad_words: Annotated[
        Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None,
        Field(description="Words that the reply must not have: the token that would complete one is not chosen."),
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)] | None,
        Field(
            description="The only tokens that the reply may have; put an end token among them, or it ends by length."
        ),
    ] = None
    cache_salt: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] | None,
        Field(description="Share cached prefixes only with requests that have the same salt."),
    ] = None
    priority: Annotated[
        Annotated[int, Field(ge=-INT32_MAX - 1, le=INT32_MAX)] | None,
        Field(description="Lower values run first; needs a server with --enable-priority."),
    ] = None

    max_tokens: Annotated[
        TokenLimit | None, Field(description="The longest reply, in tokens; -1: what the context leaves.")
    ] = None
    max_completion_tokens: Annotated[
        TokenLimit | None, Field(description="OpenAI's newer name of `max_tokens`; send one of them.")
    ] = None
    response_format: Annotated[
        ResponseFormat, Field(description='{"type": "text"}; other formats are not supported yet.')
    ] = None
    structured_outputs: Annotated[
        dict[str, Any] | None, unsupported({}), Field(description="vLLM's grammars; not supported yet.")
    ] = None

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
    def _check_shared_pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("is only allowed with `stream`: true", field="stream_options")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) == 2:
            why = f"is {self.max_tokens}, but `max_completion_tokens` is {self.max_completion_tokens}; send one of them"
            raise invalid(why, field="max_tokens")
        return self

    def reply_limit(self, *, default: int, context: int) -> int:
        """The most tokens that the reply may have: `default` where the client names no number."""
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return default if limit is None else context if limit == -1 else limit

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
