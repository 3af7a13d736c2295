"""/v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from jamba_server.server.http.schemas.base import (
    FinishReason,
    GenerationBody,
    NotYet,
    Reply,
    RequestBody,
    TopLogprobs,
    Usage,
    invalid,
    not_yet,
    string_or_list,
    within,
)


def _only_text_part(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") != "text":
        why = f"The model reads text only, not parts of type {str(value.get('type'))[:32]!r}."
        raise PydanticCustomError("not_text", "{why}", {"why": why})
    return value


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


ContentPart = Annotated[TextPart, BeforeValidator(_only_text_part)]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


def _role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise not_yet(f"A message with the role {value!r}")
    return value


class ChatMessage(RequestBody):
    """One turn. `developer` is another name for `system`; null content is empty content."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Content | None = None
    name: Annotated[str, Field(max_length=256)] | None = None

    tool_call_id: NotYet = None
    # what an assistant's reply carries besides, when a client sends it back as it came
    refusal: NotYet = None
    annotations: NotYet = None
    audio: NotYet = None
    tool_calls: NotYet = None
    function_call: NotYet = None
    reasoning: NotYet = None
    reasoning_content: NotYet = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise invalid("Field required", field="content")
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


def _only_none(value: Any) -> Any:
    if value not in (None, "none"):
        raise not_yet('`tool_choice` other than "none"')
    return value


def _only_text_output(value: Any) -> Any:
    if value not in (None, ["text"]):
        raise not_yet('`modalities` other than ["text"]')
    return value


class ChatCompletionRequest(GenerationBody):
    """OpenAI's chat completion with vLLM's extra fields. Without a limit the reply may fill the context."""

    messages: Messages
    max_tokens: Annotated[int, within("max_tokens", low=1)] | None = None
    max_completion_tokens: Annotated[int, within("max_tokens", low=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_special_tokens: Annotated[
        Literal[False], Field(description="always false: the chat template writes the special tokens")
    ] = False

    tool_choice: Annotated[Literal["none"] | None, BeforeValidator(_only_none)] = None
    modalities: Annotated[list[Literal["text"]] | None, BeforeValidator(_only_text_output)] = None
    tools: NotYet = None
    parallel_tool_calls: NotYet = None
    functions: NotYet = None
    function_call: NotYet = None
    reasoning_effort: NotYet = None
    verbosity: NotYet = None
    audio: NotYet = None
    prediction: NotYet = None
    moderation: NotYet = None
    web_search_options: NotYet = None
    prompt_cache_options: NotYet = None
    prompt_cache_retention: NotYet = None
    documents: NotYet = None
    chat_template: NotYet = None
    chat_template_kwargs: NotYet = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("Only allowed with `logprobs`: true.", field="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) == 2:
            why = f"{self.max_tokens} is not `max_completion_tokens`, {self.max_completion_tokens}; send one of them."
            raise invalid(why, field="max_tokens")
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
