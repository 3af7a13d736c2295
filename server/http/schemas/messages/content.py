"""The messages of a request for /v1/messages. The content of a message is a string or a list of blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.server.http.schemas.base import RequestBody, invalid, string_or_list

MAX_ID_CHARS = 256
MAX_TYPE_CHARS = 32  # an error message repeats at most this number of characters of an unknown block type


class CacheControl(RequestBody):
    """A cache mark (`cache_control`): the client expects that later requests have the same prompt up to this mark."""

    type: Annotated[Literal["ephemeral"], Field(description='Always "ephemeral".')]
    ttl: Annotated[
        Literal["5m", "1h"] | None,
        Field(description="It has no effect: cached prefixes stay until the cache needs their memory."),
    ] = None


Mark = Annotated[
    CacheControl | None, Field(description="Save the model's state at the end of the message that has this mark.")
]


class TextBlock(RequestBody):
    type: Literal["text"]
    text: Annotated[str, Field(description="The text.")]
    cache_control: Mark = None


class ToolReferenceBlock(RequestBody):
    """The name of a tool that a search for tools has found. The model reads the name as text."""

    type: Literal["tool_reference"]
    tool_name: Annotated[str, Field(description="The name of the tool.")]
    cache_control: Mark = None

    @property
    def text(self) -> str:
        return self.tool_name


class ThinkingBlock(RequestBody):
    """The model's reasoning in an earlier reply. The signature is not checked."""

    type: Literal["thinking"]
    thinking: Annotated[str, Field(description="The reasoning.")]
    signature: Annotated[str | None, Field(description="It is not checked.")] = None


class RedactedThinkingBlock(RequestBody):
    """Reasoning that only Anthropic's servers can decrypt, so the prompt leaves it out."""

    type: Literal["redacted_thinking"]
    data: Annotated[str, Field(description="The encrypted reasoning, which has no effect.")]


class ToolUseBlock(RequestBody):
    """A tool call of an earlier reply."""

    type: Literal["tool_use"]
    id: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)], Field(description="The id of the call.")
    ]
    name: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)], Field(description="The name of the tool.")
    ]
    input: Annotated[dict[str, Any], Field(description="The arguments of the call.")]
    cache_control: Mark = None


def _check_type(*known: str) -> BeforeValidator:
    """Returns a validator that refuses blocks of other types than the `known` ones, with an error that names the
    type."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and (kind := value.get("type")) not in known:
            shown = repr(str(kind)[:MAX_TYPE_CHARS]) if kind is not None else "(none)"
            why = (
                f"has the type {shown}, but the model reads only text; the type must be {' or '.join(map(repr, known))}"
            )
            raise PydanticCustomError("block_type", "{why}", {"why": why})
        return value

    return BeforeValidator(check)


def _tag(value: Any) -> str:
    """Returns the tag by which pydantic chooses the class that validates a content block."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if isinstance(kind, str) else "(text)"


_AS_TEXT_OR_BLOCKS = Discriminator(
    string_or_list, custom_error_type="content_type", custom_error_message="must be a string or a list of blocks"
)

TextOnly = Annotated[TextBlock, _check_type("text")]
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("(text)")] | Annotated[ToolReferenceBlock, Tag("(tool_reference)")],
    Discriminator(_tag),
    _check_type("text", "tool_reference"),
]
Texts = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[TextOnly], Field(fail_fast=True), Tag("(list)")],
    _AS_TEXT_OR_BLOCKS,
]
ResultContent = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[ResultBlock], Field(fail_fast=True), Tag("(list)")],
    _AS_TEXT_OR_BLOCKS,
]


class ToolResultBlock(RequestBody):
    """What a tool has returned for a tool call of an earlier reply."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)], Field(description="The id of the call.")
    ]
    content: Annotated[ResultContent | None, Field(description="The result: a text, or a list of text blocks.")] = None
    is_error: Annotated[bool | None, Field(description="Whether the call has failed.")] = None
    cache_control: Mark = None


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[RedactedThinkingBlock, Tag("(redacted_thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")],
    Discriminator(_tag),
    _check_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[Block], Field(fail_fast=True), Tag("(list)")], _AS_TEXT_OR_BLOCKS
]

# Maps each role to the types of content blocks that its messages may have.
_BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


class InputMessage(RequestBody):
    """One message of the conversation."""

    role: Annotated[
        Literal["user", "assistant", "system"],
        Field(description="The author of the message. A system message stays where it is in the conversation."),
    ]
    content: Annotated[Content, Field(description="The text, or a list of blocks.")]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for block in self.blocks:
            if block.type not in (allowed := _BLOCKS_OF[self.role]):
                why = f"has a block of the type {block.type!r}; with the role {self.role!r} the type must be "
                raise invalid(why + " or ".join(map(repr, allowed)), field="content")
        return self

    @property
    def blocks(self) -> list[Block]:
        """Returns the content as a list of blocks. A string becomes one block of text."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content
