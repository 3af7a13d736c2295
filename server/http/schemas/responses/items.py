"""The items of the field `input` in requests to /v1/responses.

Each class has a method `to_item`, which returns the item in the form in which it is stored and listed. If the client's
item has no id, it gets one.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from jamba_server.server.http.schemas.base import RequestBody, string_or_list

Item = dict[str, Any]

MAX_ID_CHARS = 256
# In the reasoning items of this server, the field `encrypted_content` begins with this text, and the rest is the
# reasoning in base64. The reasoning is not encrypted, because the client sees it anyway.
_ENCODED_REASONING = "jamba-reasoning:"

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def encode_reasoning(text: str) -> str:
    """Returns the reasoning in the form of the field `encrypted_content`. The function `decode_reasoning` is the
    inverse."""
    return _ENCODED_REASONING + base64.b64encode(text.encode()).decode()


def decode_reasoning(encrypted_content: str) -> str | None:
    """Returns the reasoning in a value of `encrypted_content`, or None if another server made the value."""
    if not encrypted_content.startswith(_ENCODED_REASONING):
        return None
    try:
        return base64.b64decode(encrypted_content.removeprefix(_ENCODED_REASONING), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def _only_text(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") not in ("input_text", "output_text", "text", "refusal"):
        kind = str(value.get("type", "(none)"))[:32]
        why = f"has the type {kind!r}, but the model reads only text; the type must be 'input_text' or 'output_text'"
        raise PydanticCustomError("not_text", "{why}", {"why": why})
    return value


class TextPart(RequestBody):
    """A text of the user (`input_text`) or of an earlier reply (`output_text`)."""

    type: Annotated[Literal["input_text", "output_text", "text"], Field(description="What kind of text it is.")]
    text: Annotated[str, Field(description="The text.")]
    annotations: Annotated[list[Any] | None, Field(description="Notes of an earlier reply. They have no effect.")] = (
        None
    )
    logprobs: Annotated[
        list[Any] | None, Field(description="Log-probabilities of an earlier reply. They have no effect.")
    ] = None


class RefusalPart(RequestBody):
    """A text part in which a model of another server has refused to answer."""

    type: Literal["refusal"]
    refusal: Annotated[str, Field(description="The text, which the model reads as text of the reply.")]

    @property
    def text(self) -> str:
        return self.refusal


def _part_type(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "(refusal)" if kind == "refusal" else "(text)"


Part = Annotated[
    Annotated[Annotated[TextPart, Tag("(text)")] | Annotated[RefusalPart, Tag("(refusal)")], Discriminator(_part_type)],
    BeforeValidator(_only_text),
]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[Part], Field(fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


def _texts(content: str | list[TextPart | RefusalPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


class _InputItem(RequestBody):
    id: Annotated[ItemId | None, Field(description="The id of the item. It has no effect.")] = None
    status: Annotated[str | None, Field(description="The state of the item. It has no effect.")] = None


class Message(_InputItem):
    """A message. Its text is a string or a list of parts, which are joined by line feeds."""

    type: Annotated[Literal["message"], Field(description='Always "message". May be left out.')] = "message"
    role: Annotated[
        Literal["user", "assistant", "system", "developer"],
        Field(description="The author of the message. `developer` is another name for `system`."),
    ]
    content: Annotated[Content, Field(description="The text, or a list of its parts.")]
    phase: Annotated[str | None, Field(description="A label of an earlier reply. It has no effect.")] = None

    def to_item(self) -> Item:
        if self.role == "assistant":
            parts = [{"type": "output_text", "text": text, "annotations": []} for text in _texts(self.content)]
        else:
            parts = [{"type": "input_text", "text": text} for text in _texts(self.content)]
        return {
            "id": self.id or new_id("msg"),
            "type": "message",
            "role": self.role,
            "status": "completed",
            "content": parts,
        }


class _Call(_InputItem):
    call_id: Annotated[ItemId, Field(description="The id that the output of the call names.")]
    name: Annotated[str, Field(max_length=256, description="The name of the tool.")]
    namespace: Annotated[
        Annotated[str, Field(max_length=256)] | None, Field(description="The namespace of the tool.")
    ] = None

    def _to_call(self, prefix: str, kind: str, field: str, value: str) -> Item:
        item = {
            "id": self.id or new_id(prefix),
            "type": kind,
            "call_id": self.call_id,
            "name": self.name,
            field: value,
            "status": "completed",
        }
        return item if self.namespace is None else item | {"namespace": self.namespace}


class FunctionCall(_Call):
    """A call of a function by the model."""

    type: Literal["function_call"]
    arguments: Annotated[str, Field(description="The arguments as JSON text.")]

    def to_item(self) -> Item:
        return self._to_call("fc", "function_call", "arguments", self.arguments)


class CustomToolCall(_Call):
    """A call of a custom tool by another server's model."""

    type: Literal["custom_tool_call"]
    input: Annotated[str, Field(description="The text that the model gave to the tool.")]

    def to_item(self) -> Item:
        return self._to_call("ctc", "custom_tool_call", "input", self.input)


class _CallOutput(_InputItem):
    call_id: Annotated[ItemId, Field(description="The id of the call.")]
    output: Annotated[Content, Field(description="The result: a string or a list of text parts.")]
    name: Annotated[str | None, Field(description="The name of the tool. It has no effect.")] = None
    namespace: Annotated[str | None, Field(description="The namespace of the tool. It has no effect.")] = None

    def _to_output(self, prefix: str, kind: str) -> Item:
        return {
            "id": self.id or new_id(prefix),
            "type": kind,
            "call_id": self.call_id,
            "output": "\n".join(_texts(self.output)),
            "status": "completed",
        }


class FunctionCallOutput(_CallOutput):
    """The result of a function."""

    type: Literal["function_call_output"]

    def to_item(self) -> Item:
        return self._to_output("fco", "function_call_output")


class CustomToolCallOutput(_CallOutput):
    """The result of a custom tool."""

    type: Literal["custom_tool_call_output"]

    def to_item(self) -> Item:
        return self._to_output("ctco", "custom_tool_call_output")


class ReasoningPart(RequestBody):
    """A text of a reasoning item. OpenAI's models send summaries instead of the whole reasoning."""

    type: Annotated[Literal["reasoning_text", "summary_text", "text"], Field(description="The kind of the text.")]
    text: Annotated[str, Field(description="The text.")]


class Reasoning(_InputItem):
    """The reasoning of an earlier reply. The prompt gets the text in `content`. If there is none, the prompt gets the
    reasoning from `encrypted_content`, if this server has made that value."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(description="A summary of the reasoning. It has no effect.")] = Field(
        default_factory=list[ReasoningPart]
    )
    content: Annotated[list[ReasoningPart] | None, Field(description="The reasoning.")] = None
    encrypted_content: Annotated[
        str | None,
        Field(
            description="The reasoning as this server has encoded it. What other servers have encrypted is not read."
        ),
    ] = None

    @property
    def text(self) -> str | None:
        """Returns the reasoning, or None if the item has only a summary or a reasoning that another server has
        encrypted."""
        if self.content:
            return "".join(part.text for part in self.content)
        return None if self.encrypted_content is None else decode_reasoning(self.encrypted_content)

    def to_item(self) -> Item:
        content = [] if self.text is None else [{"type": "reasoning_text", "text": self.text}]
        summary = [{"type": "summary_text", "text": part.text} for part in self.summary]
        return {"id": self.id or new_id("rs"), "type": "reasoning", "summary": summary, "content": content}


class ItemReference(RequestBody):
    """A reference to an item of a stored response. The server replaces the reference by that item."""

    type: Annotated[Literal["item_reference"] | None, Field(description='Always "item_reference".')] = None
    id: Annotated[ItemId, Field(description="The id of the item.")]


ITEM_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "item_reference",
)


def _item_type(value: Any) -> str:
    """Returns the tag by which pydantic chooses the class that validates an input item. An item without a type is a
    message if it has a role, and otherwise a reference."""
    if isinstance(value, dict):
        return f"({value.get('type') or ('message' if 'role' in value or 'id' not in value else 'item_reference')})"
    return f"({getattr(value, 'type', None) or 'item_reference'})"


def _known_type(value: Any) -> Any:
    if isinstance(value, dict) and (kind := value.get("type")) is not None and kind not in ITEM_TYPES:
        why = f"has the type {str(kind)[:48]!r}, which this server does not read; it reads {', '.join(ITEM_TYPES)}"
        raise PydanticCustomError("item_type", "{why}", {"why": why})
    return value


InputItem = Annotated[
    Annotated[
        Annotated[Message, Tag("(message)")]
        | Annotated[FunctionCall, Tag("(function_call)")]
        | Annotated[FunctionCallOutput, Tag("(function_call_output)")]
        | Annotated[CustomToolCall, Tag("(custom_tool_call)")]
        | Annotated[CustomToolCallOutput, Tag("(custom_tool_call_output)")]
        | Annotated[Reasoning, Tag("(reasoning)")]
        | Annotated[ItemReference, Tag("(item_reference)")],
        Discriminator(_item_type),
    ],
    BeforeValidator(_known_type),
]
AnyInputItem = (
    Message | FunctionCall | FunctionCallOutput | CustomToolCall | CustomToolCallOutput | Reasoning | ItemReference
)
