"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import (
    FinishReason,
    GenerationBody,
    Reply,
    RequestBody,
    TopLogprobs,
    Usage,
    invalid,
    not_yet,
    string_or_list,
    unsupported,
)


def _only_text_part(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        kind = str(value.get("type", "(none)"))[:32]
        why = f"has the type {kind!r}, but the model reads text only; the type must be 'text'"
        raise PydanticCustomError("not_text", "{why}", {"why": why})
    return value


class TextPart(RequestBody):
    """A piece of a message's text."""

    type: Annotated[Literal["text"], Field(description='Always "text": the model reads nothing else.')]
    text: Annotated[str, Field(description="The text itself.")]


ContentPart = Annotated[TextPart, BeforeValidator(_only_text_part)]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise not_yet(f"the value {value!r}, which")
    return value


class ChatMessage(RequestBody):
    """One turn. `developer` is another name for `system`; null content is empty content."""

    peers = peer_fields.MESSAGE

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        BeforeValidator(_role),
        Field(description="Who speaks; `developer` is another name for `system`."),
    ]
    content: Annotated[
        Content | None, Field(description="The text, or its parts, which line feeds separate; null is empty.")
    ] = None
    name: Annotated[
        Annotated[str, Field(max_length=256)] | None,
        Field(description="The speaker's name, if the template has a place."),
    ] = None

    tool_call_id: Annotated[
        str | None, unsupported(""), Field(description="The call that a tool's reply answers; not supported yet.")
    ] = None
    # what an assistant's reply carries besides, when a client sends it back as it came
    annotations: Annotated[
        list[Any] | None, Field(description="Notes on an earlier reply, as clients send them back; change nothing.")
    ] = None
    refusal: Annotated[
        str | None, unsupported(""), Field(description="An earlier refusal; only null, for replies here have none.")
    ] = None
    audio: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="An earlier reply in sound; not supported.")
    ] = None
    tool_calls: Annotated[
        list[Any] | None, unsupported([]), Field(description="The calls that the assistant made; not supported yet.")
    ] = None
    function_call: Annotated[
        dict[str, Any] | None,
        unsupported({}),
        Field(description="OpenAI's older name of a tool's call; not supported."),
    ] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise invalid("is required", field="content")
        return self

    @property
    def text(self) -> str:
        """The content; parts are separated by a line feed."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, object]:
        """The message as chat templates expect it."""
        message: dict[str, object] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatCompletionRequest(GenerationBody):
    """OpenAI's chat completion with vLLM's extra fields. Without a limit the reply may fill the context."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Tell me a story."}], "max_completion_tokens": 64}]
        }
    )

    peers = peer_fields.CHAT

    messages: Annotated[Messages, Field(description="The conversation so far, oldest message first.")]
    logprobs: Annotated[bool | None, Field(description="Give the log-probabilities of the reply's tokens.")] = None
    top_logprobs: Annotated[
        TopLogprobs | None, Field(description="With `logprobs`: also those of so many of the most likely tokens.")
    ] = None
    add_special_tokens: Annotated[
        Literal[False], Field(description="Always false: the chat template writes the special tokens.")
    ] = False
    add_generation_prompt: Annotated[
        bool, Field(description="End the prompt with the beginning of the assistant's turn.")
    ] = True
    continue_final_message: Annotated[
        bool | None, unsupported(False), Field(description="Go on with the last message; not supported yet.")
    ] = None

    tools: Annotated[
        list[Any] | None, unsupported([]), Field(description="Functions that the model may call; not supported yet.")
    ] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        unsupported("none", "auto"),
        Field(description='Which tool to call; without tools "none" and "auto" are the same.'),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Field(description="Whether several tools may be called at once; there are none yet.")
    ] = None
    functions: Annotated[
        list[Any] | None, unsupported([]), Field(description="OpenAI's older name of `tools`; not supported.")
    ] = None
    function_call: Annotated[
        str | dict[str, Any] | None,
        unsupported("none", "auto"),
        Field(description="OpenAI's older name of `tool_choice`."),
    ] = None
    reasoning_effort: Annotated[
        str | None, unsupported("none"), Field(description='How long to reason; only "none" so far.')
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None,
        unsupported([], ["text"]),
        Field(description='What the reply is made of; only ["text"].'),
    ] = None
    audio: Annotated[dict[str, Any] | None, unsupported(), Field(description="A spoken reply; not supported.")] = None
    prediction: Annotated[
        dict[str, Any] | None,
        unsupported(),
        Field(description="Text that the reply will likely have; not supported yet."),
    ] = None
    moderation: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A check of prompt and reply; not supported.")
    ] = None
    web_search_options: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A search of the web; not supported.")
    ] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None, unsupported({}), Field(description="What of the prompt to cache; not supported yet.")
    ] = None
    prompt_cache_retention: Annotated[
        str | None,
        unsupported("in_memory", "in-memory"),
        Field(description="How long to cache; only in memory so far."),
    ] = None
    documents: Annotated[
        list[Any] | None, unsupported([]), Field(description="Texts for the template to cite; not supported yet.")
    ] = None
    chat_template: Annotated[
        str | None, unsupported(""), Field(description="A template in place of the model's; not supported yet.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, unsupported({}), Field(description="Variables of the template; not supported yet.")
    ] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("is only allowed with `logprobs`: true", field="top_logprobs")
        for field in ("max_tokens", "max_completion_tokens"):
            if getattr(self, field) == 0:
                raise invalid("is 0; it must be at least 1, or -1 for what the context leaves", field=field)
        return self


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]


class ReplyMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """`stop_reason`: the stop string or the id in `stop_token_ids` that ended the choice."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(TypedDict, total=False):
    """`role` in the first one, `content` in those that have some, nothing in the one with the finish reason."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream. `usage` is there only with `stream_options.include_usage`; null in all but the last."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
