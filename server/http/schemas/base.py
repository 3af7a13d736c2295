"""The fields, types and validators that the requests and replies of several endpoints share."""

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

MAX_CHOICES = 128  # maximum value of `n`, the number of choices for one prompt
MAX_STOPS = 64  # maximum number of stop strings in a request; more strings make the search of a reply slower
MAX_BAD_WORDS = 64
MAX_CACHE_SALT_CHARS = 128
MAX_PIN_SECONDS = 24 * 3600
MAX_TIMEOUT_SECONDS = 7 * 24 * 3600


def within(field: str, *, low: float | None = None) -> Any:
    """Returns pydantic's declaration of the range of the sampling parameter `field`, from the engine's table RANGES.

    If the argument `low` is given, it replaces the lower bound in the table.
    """
    bounds = RANGES[field]
    if bounds.open:
        return Field(gt=bounds.low, le=bounds.high)
    return Field(ge=bounds.low if low is None else low, le=bounds.high)


def invalid(why: str, *, field: str, kind: LiteralString = "invalid") -> PydanticCustomError:
    """Returns pydantic's error for the field named `field`. Validators of whole objects raise this error.

    The argument `why` is the predicate of a sentence that begins with the field's name, such as "is required".
    """
    return PydanticCustomError(kind, "{why}", {"why": why, "field": field})


class RequestBody(BaseModel):
    """The base class of all JSON objects in requests.

    pydantic stores the unknown fields of an object in the attribute `model_extra`. The class attribute `peers` has the
    fields of other servers that the object is checked for.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    peers: ClassVar[peer_fields.PeerFields] = peer_fields.NONE

    @model_validator(mode="before")
    @classmethod
    def _check_unknown(cls, data: Any) -> Any:
        """Refuses unknown fields that would change the answer or that look like a misspelling of a known field.

        The option `--unknown-fields` says whether all other unknown fields are ignored or refused.
        """
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


class NullableBody(RequestBody):
    """The base class of requests in which an optional field may be null, which means the same as leaving it out."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Removes optional fields whose value is null, so that these fields get their default values."""
        if not isinstance(data, dict):
            return data
        fields = cast("dict[str, Any]", data)
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}


class Reply(BaseModel):
    """The base class of all JSON objects in replies."""

    model_config = ConfigDict(frozen=True)


def _is_none(value: object) -> bool:
    return value is None


# A pydantic field declaration: the JSON of a reply leaves the field out if its value is None.
if_any: Any = Field(exclude_if=_is_none)


def not_yet(feature: str = "") -> PydanticCustomError:
    """Returns pydantic's error for a field that this server does not support yet.

    If the argument `feature` is given, the error says that the server lacks only this feature of the field.
    """
    why = f"has {NotSupportedYet(feature)}" if feature else "is not supported yet"
    return PydanticCustomError("not_supported_yet", "{why}", {"why": why.removesuffix(".")})


def unsupported(*neutral: object) -> BeforeValidator:
    """Returns a validator for a known field of the API that this server does not support.

    The validator accepts null and the values in `neutral`, which leave the answer unchanged. It refuses all other
    values.
    """

    def refuse(value: object) -> object:
        if value is not None and value not in neutral:
            raise not_yet()
        return value

    return BeforeValidator(refuse)


def string_or_list(value: object) -> str | None:
    """Returns the tag that tells pydantic whether to validate the value as a string or as a list.

    Tags are in parentheses, because findings.py leaves out parts in parentheses when it names a field in an error.
    """
    return "(string)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


CacheSalt = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARS)] | None,
    Field(description="Share cached prefixes only with requests of this API key that have the same salt."),
]
Priority = Annotated[
    Annotated[int, Field(ge=-INT32_MAX - 1, le=INT32_MAX)] | None,
    Field(description="Lower values run first. The server must run with --enable-priority."),
]
Timeout = Annotated[
    Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None,
    Field(description="Seconds after which the request is aborted. The header X-Request-Timeout does the same."),
]
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
    """Converts the keys of `logit_bias` from strings to token ids. JSON allows only strings as keys."""
    if not isinstance(value, dict):
        return value
    token_ids: dict[int, object] = {}
    for key, bias in cast("dict[str, object]", value).items():
        try:
            token_ids[int(key)] = bias
        except ValueError:
            why = f"has the key {key[:48]!r}; every key must be a token id, like '2'"
            raise PydanticCustomError("token_id", "{why}", {"why": why}) from None
    return token_ids


def _not_blank(value: object) -> object:
    if isinstance(value, str) and value and not value.strip(" "):
        raise PydanticCustomError("blank", "has only spaces; a word must have another character")
    return value


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, within("logit_bias")]],
    Field(max_length=MAX_LOGIT_BIAS_ENTRIES),
    BeforeValidator(_token_ids),
]
BadWord = Annotated[str, Field(min_length=1, max_length=256), BeforeValidator(_not_blank)]
TopLogprobs = Annotated[int, within("logprobs")]
# Maximum number of tokens in a reply. The value -1 means no limit other than the context length, as in llama.cpp.
TokenLimit = Annotated[int, within("max_tokens", low=-1)]


class StreamOptions(RequestBody):
    """Options that say which additional data the events of a stream have."""

    include_usage: Annotated[
        bool | None, Field(description="Send one more event with the token counts at the end.")
    ] = None
    continuous_usage_stats: Annotated[
        bool | None,
        Field(description="vLLM's field: with `include_usage`, every event has the token counts so far."),
    ] = None
    include_obfuscation: Annotated[
        Literal[False] | None,
        Field(description="Padding against traffic analysis. Must be false: this server has no such padding."),
    ] = None


class CacheOptions(RequestBody):
    """How a request uses the prefix cache. No option changes the reply."""

    explain: Annotated[
        bool, Field(description="Add `jamba_cache` to the reply: what the cache had for the prompt, and why not more.")
    ] = False
    read: Annotated[bool, Field(description="If false, the whole prompt is computed.")] = True
    write: Annotated[
        bool, Field(description="If false, nothing of the request stays in the cache, and each choice is computed.")
    ] = True
    pin: Annotated[
        Annotated[float, Field(gt=0, le=MAX_PIN_SECONDS)] | None,
        Field(
            description="Protect the prompt and the reply from eviction for this number of seconds after the reply. "
            "Running requests still get the memory that they need."
        ),
    ] = None

    @model_validator(mode="after")
    def _check_pin(self) -> Self:
        if self.pin and not self.write:
            raise invalid("needs `write`: true, because only what is in the cache can be pinned", field="pin")
        return self


class NoEffect(RequestBody):
    """Fields of OpenAI's specification that this server accepts and ignores, because they do not affect the answer."""

    user: Annotated[str | None, Field(description="The client's name for its user. It has no effect.")] = None
    metadata: Annotated[dict[str, str] | None, Field(description="The client's own notes. They have no effect.")] = None
    store: Annotated[bool | None, Field(description="It has no effect: only /v1/responses stores replies.")] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None,
        Field(description="It has no effect: this server has one tier."),
    ] = None
    safety_identifier: Annotated[str | None, Field(description="The client's name for its user. It has no effect.")] = (
        None
    )
    prompt_cache_key: Annotated[
        str | None, Field(description="A hint for routing between machines. It has no effect.")
    ] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None,
        Field(description="The parts of the prompt that are cached. It has no effect: every prefix is cached."),
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "in-memory", "24h"] | None,
        Field(description="How long prompts are cached. It has no effect: the size of the cache decides."),
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None, Field(description="vLLM's field for slow tokenizers. It has no effect.")
    ] = None


Temperature = Annotated[
    Annotated[float, within("temperature")] | None,
    Field(description="Randomness of sampling. 0 always chooses the most likely token."),
]
TopP = Annotated[
    Annotated[float, within("top_p")] | None,
    Field(description="Sample from the fewest tokens whose probabilities add up to this. 1 means all tokens."),
]


class GenerationBody(NoEffect, NullableBody):
    """The fields that requests for chat completions and for completions have in common.

    A sampling parameter that is null or missing gets its default from the model's generation_config.json.
    """

    model: Annotated[
        Annotated[str, Field(max_length=512)] | None,
        Field(description="One of the names that /v1/models lists. Default: the first of them."),
    ] = None
    n: Annotated[
        Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None,
        Field(description="Number of choices for each prompt. Default: 1."),
    ] = None
    stream: Annotated[bool | None, Field(description="Send the reply as server-sent events while it is generated.")] = (
        None
    )
    stream_options: Annotated[
        StreamOptions | None, Field(description="Options for the events of a stream. Only allowed with `stream`.")
    ] = None
    seed: Annotated[
        Annotated[int, within("seed")] | None,
        Field(description="The same seed, prompt and parameters give the same reply. Default: a random seed."),
    ] = None
    stop: Annotated[Stop | None, Field(description=f"A string that ends the reply, or up to {MAX_STOPS} of them.")] = (
        None
    )
    temperature: Temperature = None
    top_p: TopP = None
    presence_penalty: Annotated[
        Annotated[float, within("presence_penalty")] | None,
        Field(description="Subtracted from the logits of tokens that the reply already contains."),
    ] = None
    frequency_penalty: Annotated[
        Annotated[float, within("frequency_penalty")] | None,
        Field(description="Subtracted from a token's logit once for each time that the reply contains the token."),
    ] = None
    logit_bias: Annotated[
        LogitBias | None, Field(description="Maps token ids, as strings, to numbers that are added to their logits.")
    ] = None

    # The following fields are not in OpenAI's API. They are fields of vLLM's API.
    top_k: Annotated[
        Annotated[int, within("top_k", low=-1)] | None,
        Field(description="Sample from this number of the most likely tokens. 0 and -1 mean all tokens."),
    ] = None
    min_p: Annotated[
        Annotated[float, within("min_p")] | None,
        Field(description="Sample from tokens with at least this share of the most likely token's probability."),
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, within("repetition_penalty")] | None,
        Field(description="Divides positive logits, and multiplies negative logits, of tokens in the prompt or reply."),
    ] = None
    stop_token_ids: Annotated[
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None,
        Field(description="Token ids that end the reply, in addition to the model's end tokens."),
    ] = None
    include_stop_str_in_output: Annotated[
        bool, Field(description="Keep the stop string or stop token in the reply's text.")
    ] = False
    ignore_eos: Annotated[bool, Field(description="Continue the reply after the model's end token.")] = False
    min_tokens: Annotated[
        int, within("min_tokens"), Field(description="Number of tokens that the reply must have before it may end.")
    ] = 0
    skip_special_tokens: Annotated[bool, Field(description="Leave special tokens out of the text.")] = True
    bad_words: Annotated[
        Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None,
        Field(description="Words that the reply must not contain. A token that would complete one is not chosen."),
    ] = None
    allowed_token_ids: Annotated[
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, fail_fast=True)] | None,
        Field(
            description="The only token ids that the reply may have. Without an end token the reply ends by its length."
        ),
    ] = None
    cache_salt: CacheSalt = None
    cache: Annotated[
        CacheOptions | None,
        Field(description="How the request uses the prefix cache: `explain`, `read`, `write` and `pin`."),
    ] = None
    priority: Priority = None
    timeout: Timeout = None

    max_tokens: Annotated[
        TokenLimit | None, Field(description="Maximum tokens of the reply. -1 means the rest of the context.")
    ] = None
    max_completion_tokens: Annotated[
        TokenLimit | None, Field(description="OpenAI's newer name for `max_tokens`. Send only one of the two.")
    ] = None

    @model_validator(mode="after")
    def _check_shared_pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("is only allowed with `stream`: true", field="stream_options")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) == 2:
            why = f"is {self.max_tokens}, but `max_completion_tokens` is {self.max_completion_tokens}; send one of them"
            raise invalid(why, field="max_tokens")
        return self

    def reply_limit(self, *, default: int, context: int) -> int:
        """Returns the maximum number of tokens in the reply.

        If the client sends no maximum, the argument `default` is returned. If the client sends -1, the argument
        `context`, which is the context length, is returned.
        """
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return default if limit is None else context if limit == -1 else limit

    @property
    def reports_usage(self) -> bool:
        """Returns whether a stream ends with an event that has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def reports_usage_continuously(self) -> bool:
        return self.reports_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class PromptTokensDetails(Reply):
    cached_tokens: int


class CompletionTokensDetails(Reply):
    """`reasoning_tokens` is the number of generated tokens that belong to the model's reasoning, including its end
    tag."""

    reasoning_tokens: int


class Usage(Reply):
    """The token counts of one HTTP request. A prompt counts once, however many choices (`n`) it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(Reply):
    """How long the phases of a request took. The fields have the names that llama.cpp's server uses.

    `cache_n` prompt tokens were found in the prefix cache, and `prompt_n` were computed in `prompt_ms` milliseconds,
    until the first token came. `predicted_n` tokens were generated in `predicted_ms` milliseconds, from the first token
    on. `queue_ms` is the time in the engine's queue, which is not part of `prompt_ms`. The times of several choices are
    those of the slowest, and the numbers of tokens are sums.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    queue_ms: float


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorReply(Reply):
    error: ErrorDetail


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class PromptLogprob(Reply):
    """The log-probability of a token at a position of the prompt.

    `rank` is 1 for the most likely token. `rank` is null if the token is not among the most likely tokens that the
    request asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


# The first entry is null, because the model does not predict the first token.
PromptLogprobs = list[dict[int, PromptLogprob] | None]
