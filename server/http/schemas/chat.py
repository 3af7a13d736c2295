"""The request and the replies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic cannot use typing.TypedDict before Python 3.12

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
from jamba_server.server.http.schemas.formats import FormatFields


def _only_text_part(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        kind = str(value.get("type", "(none)"))[:32]
        why = f"has the type {kind!r}, but the model reads only text; the type must be 'text'"
        raise PydanticCustomError("not_text", "{why}", {"why": why})
    return value


class TextPart(RequestBody):
    """One part of the content of a message, if the content is a list. Only parts that are texts are supported."""

    type: Annotated[Literal["text"], Field(description='Must be "text", because the model reads only text.')]
    text: Annotated[str, Field(description="The text of this part.")]


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
    """One message of a conversation. If its `content` is null, the text of the message is empty."""

    peers = peer_fields.MESSAGE

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        BeforeValidator(_role),
        Field(description="The author of the message. `developer` is another name for `system`."),
    ]
    content: Annotated[
        Content | None,
        Field(description="The text, or a list of its parts, which are joined by line feeds. null is an empty text."),
    ] = None
    name: Annotated[
        Annotated[str, Field(max_length=256)] | None,
        Field(description="The author's name. It is used if the chat template mentions it."),
    ] = None

    tool_call_id: Annotated[
        str | None,
        unsupported(""),
        Field(description="The id of the tool call that this message answers. Not supported yet."),
    ] = None
    # Messages in OpenAI's replies have the following fields. Clients send them back with the conversation.
    annotations: Annotated[
        list[Any] | None,
        Field(description="Notes on an earlier reply, which clients send back. They have no effect."),
    ] = None
    refusal: Annotated[
        str | None,
        unsupported(""),
        Field(description="The text of an earlier refusal. Must be null: replies of this server have none."),
    ] = None
    audio: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="An earlier spoken reply. Not supported.")
    ] = None
    tool_calls: Annotated[
        list[Any] | None,
        unsupported([]),
        Field(description="The tool calls of an earlier reply. Not supported yet."),
    ] = None
    function_call: Annotated[
        dict[str, Any] | None,
        unsupported({}),
        Field(description="OpenAI's older field for a tool call. Not supported."),
    ] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise invalid("is required", field="content")
        return self

    @property
    def text(self) -> str:
        """The text of the message. If the content has several parts, line feeds separate their texts."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, object]:
        """Returns the message as a dictionary with the keys `role`, `content` and `name`, which chat templates read."""
        message: dict[str, object] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatCompletionRequest(FormatFields, GenerationBody):
    """A request for a chat completion, with OpenAI's fields and vLLM's extra ones.

    If the request sets no maximum number of tokens, the reply may fill the part of the context that the prompt leaves.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Tell me a story."}], "max_completion_tokens": 64}]
        }
    )

    peers = peer_fields.CHAT

    messages: Annotated[Messages, Field(description="The conversation so far, oldest message first.")]
    logprobs: Annotated[bool | None, Field(description="Return the log-probabilities of the reply's tokens.")] = None
    top_logprobs: Annotated[
        TopLogprobs | None,
        Field(description="Number of most likely tokens to return at each position. Needs `logprobs`."),
    ] = None
    add_special_tokens: Annotated[
        Literal[False], Field(description="Must be false, because the chat template writes the special tokens.")
    ] = False
    add_generation_prompt: Annotated[
        bool, Field(description="End the prompt with the beginning of an assistant's message.")
    ] = True
    continue_final_message: Annotated[
        bool | None, unsupported(False), Field(description="Continue the last message. Not supported yet.")
    ] = None

    tools: Annotated[
        list[Any] | None, unsupported([]), Field(description="Functions that the model may call. Not supported yet.")
    ] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        unsupported("none", "auto"),
        Field(description='The tool to call. Must be "none" or "auto", because tools are not supported yet.'),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None,
        Field(description="Whether a reply may have several tool calls. It has no effect: tools are not supported."),
    ] = None
    functions: Annotated[
        list[Any] | None, unsupported([]), Field(description="OpenAI's older name for `tools`. Not supported.")
    ] = None
    function_call: Annotated[
        str | dict[str, Any] | None,
        unsupported("none", "auto"),
        Field(description='OpenAI\'s older name for `tool_choice`. Must be "none" or "auto".'),
    ] = None
    reasoning_effort: Annotated[
        str | None, unsupported("none"), Field(description='The length of reasoning. Only "none" is supported.')
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None,
        unsupported([], ["text"]),
        Field(description='The kinds of output. Only ["text"] is supported.'),
    ] = None
    audio: Annotated[dict[str, Any] | None, unsupported(), Field(description="A spoken reply. Not supported.")] = None
    prediction: Annotated[
        dict[str, Any] | None,
        unsupported(),
        Field(description="Text that the reply is expected to contain. Not supported yet."),
    ] = None
    moderation: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A moderation of prompt and reply. Not supported.")
    ] = None
    web_search_options: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="Options of a web search. Not supported.")
    ] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None,
        unsupported({}),
        Field(description="The parts of the prompt that are cached. Not supported yet."),
    ] = None
    prompt_cache_retention: Annotated[
        str | None,
        unsupported("in_memory", "in-memory"),
        Field(description='Where the prompt is cached. Only "in_memory" is supported.'),
    ] = None
    documents: Annotated[
        list[Any] | None,
        unsupported([]),
        Field(description="Documents that the chat template puts into the prompt. Not supported yet."),
    ] = None
    chat_template: Annotated[
        str | None,
        unsupported(""),
        Field(description="A chat template that replaces the model's. Not supported yet."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        unsupported({}),
        Field(description="Variables of the chat template. Not supported yet."),
    ] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("is only allowed with `logprobs`: true", field="top_logprobs")
        for field in ("max_tokens", "max_completion_tokens"):
            if getattr(self, field) == 0:
                raise invalid("is 0; it must be at least 1, or -1 for the rest of the context", field=field)
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
    """One choice of a reply. `stop_reason` is the stop string, or the id in `stop_token_ids`, that ended the choice."""

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
    """The part of a message that one event adds. The first delta of a choice has `role`. The last delta comes with the
    finish reason and is empty. All deltas between them have `content`."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(Reply):
    """One event of a stream. It has `usage` only with `stream_options.include_usage`; then the last event has the token
    counts, and in all earlier events `usage` is null unless `continuous_usage_stats` is set."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
