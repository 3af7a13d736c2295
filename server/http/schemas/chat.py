"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.engine.validation import INT32_MAX
from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import (
    RequestBody,
    TopLogprobs,
    invalid,
    string_or_list,
    unsupported,
)
from jamba_server.server.http.schemas.details import DetailedBody
from jamba_server.server.http.schemas.formats import FormatFields
from jamba_server.server.http.schemas.template_fields import TemplateFields
from jamba_server.server.http.schemas.tools import EarlierCalls, ToolChoice, check_tools


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
    if value == "function":
        why = "is 'function', which belongs to OpenAI's older `functions`; send `tools` and the role 'tool' instead"
        raise PydanticCustomError("not_supported_yet", "{why}", {"why": why})
    return value


class ChatMessage(RequestBody):
    """One message of a conversation. If its `content` is null, the text of the message is empty."""

    peers = peer_fields.MESSAGE

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        BeforeValidator(_role),
        Field(
            description="The author of the message. `developer` is another name for `system`. A message of `tool` is "
            "the result of a tool call."
        ),
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
        Annotated[str, Field(max_length=256)] | None,
        Field(description="The id of the tool call that this message answers. Only for the role `tool`."),
    ] = None
    tool_calls: Annotated[
        EarlierCalls | None, Field(description="The tool calls of an earlier reply. Only for the role `assistant`.")
    ] = None
    reasoning: Annotated[
        str | None,
        Field(description="The thoughts of an earlier reply. The chat template decides whether they are repeated."),
    ] = None
    reasoning_content: Annotated[
        str | None, Field(description="Another name for `reasoning`. If both are sent, this one counts.")
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
    function_call: Annotated[
        dict[str, Any] | None,
        unsupported({}),
        Field(description="OpenAI's older field for a tool call. Not supported."),
    ] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise invalid("is required", field="content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("is only allowed in messages of the role 'assistant'", field="tool_calls")
        if self.tool_call_id and self.role != "tool":
            raise invalid("is only allowed in messages of the role 'tool'", field="tool_call_id")
        return self

    @property
    def text(self) -> str:
        """The text of the message. If the content has several parts, line feeds separate their texts."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, object]:
        """Returns the message as a dictionary with the keys that chat templates read."""
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        optional = {
            "name": self.name,
            "tool_calls": [call.to_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": reasoning,
        }
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
            **{key: value for key, value in optional.items() if value is not None},
        }


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatCompletionRequest(TemplateFields, FormatFields, DetailedBody):
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
    tool_choice: Annotated[
        ToolChoice | None,
        Field(
            description='Whether the reply calls functions: "none", "auto" (default), "required", one named function, '
            "or a part of the functions (`allowed_tools`)."
        ),
    ] = None
    parallel_tool_calls: Annotated[bool, Field(description="Whether a reply may have several tool calls.")] = True
    functions: Annotated[
        list[Any] | None, unsupported([]), Field(description="OpenAI's older name for `tools`. Not supported.")
    ] = None
    function_call: Annotated[
        str | dict[str, Any] | None,
        unsupported("none", "auto"),
        Field(description='OpenAI\'s older name for `tool_choice`. Must be "none" or "auto".'),
    ] = None
    include_reasoning: Annotated[bool, Field(description="Whether the reply has the model's thoughts.")] = True
    thinking_token_budget: Annotated[
        Annotated[int, Field(ge=0, le=INT32_MAX)] | None,
        Field(description="Maximum number of tokens of the model's thoughts. Then the end of the thoughts is forced."),
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None,
        unsupported([], ["text"]),
        Field(description='The kinds of output. Only ["text"] is supported.'),
    ] = None
    audio: Annotated[dict[str, Any] | None, unsupported(), Field(description="A spoken reply. Not supported.")] = None
    prediction: Annotated[
        dict[str, Any] | None,
        Field(description="Text that the reply is expected to contain. It has no effect yet."),
    ] = None
    moderation: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A moderation of prompt and reply. Not supported.")
    ] = None
    web_search_options: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="Options of a web search. Not supported.")
    ] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("is only allowed with `logprobs`: true", field="top_logprobs")
        check_tools(self.tools, self.tool_choice)
        for field in ("max_tokens", "max_completion_tokens"):
            if getattr(self, field) == 0:
                raise invalid("is 0; it must be at least 1, or -1 for the rest of the context", field=field)
        return self
