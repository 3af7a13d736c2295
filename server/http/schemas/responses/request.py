"""The request of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import (
    GenerationBody,
    RequestBody,
    TopLogprobs,
    invalid,
    string_or_list,
    unsupported,
)
from jamba_server.server.http.schemas.formats import FormatFields, JsonObjectFormat, TextFormat
from jamba_server.server.http.schemas.peer_fields import PeerField
from jamba_server.server.http.schemas.responses.items import AnyInputItem, InputItem, ItemId, Message
from jamba_server.server.http.schemas.responses.tools import MAX_TOOLS, AnyTool, AnyToolChoice, Tool, ToolChoice
from jamba_server.server.http.schemas.sessions import SessionName
from jamba_server.server.text.grammars.types import OutputFormat

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
# Further values that the field `include` may have. They concern tools that this server does not have, so they have no
# effect.
_OTHER_INCLUDES = (
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
MAX_METADATA_ENTRIES = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512


class JsonSchemaFormat(RequestBody):
    """The text format of JSON that follows a schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64, description="A name of the schema. It has no effect.")]
    json_schema: Annotated[dict[str, Any], Field(alias="schema", description="The JSON schema.")]
    description: Annotated[str | None, Field(description="What the reply is for. It has no effect.")] = None
    strict: Annotated[bool | None, Field(description="Whether every keyword of the schema must be enforced.")] = None


def _format_type(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})"


def _known_format(value: Any) -> Any:
    kinds = ("text", "json_object", "json_schema")
    if isinstance(value, dict) and (kind := value.get("type")) not in kinds:
        why = f"has the type {str(kind)[:48]!r}; it must be one of {', '.join(kinds)}"
        raise PydanticCustomError("format_type", "{why}", {"why": why})
    return value


Format = Annotated[
    Annotated[
        Annotated[TextFormat, Tag("(text)")]
        | Annotated[JsonObjectFormat, Tag("(json_object)")]
        | Annotated[JsonSchemaFormat, Tag("(json_schema)")],
        Discriminator(_format_type),
    ],
    BeforeValidator(_known_format),
]


class TextOptions(RequestBody):
    """The options for the form of the reply's text."""

    format: Annotated[Format | None, Field(description="text, json_object or json_schema. Default: text.")] = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None, Field(description="The length of the text. It has no effect.")
    ] = None


class ReasoningOptions(RequestBody):
    """The options for the model's reasoning."""

    effort: Annotated[
        Annotated[str, Field(max_length=32)] | None,
        Field(description='How much the model reasons. "none" means that it answers at once.'),
    ] = None
    summary: Annotated[
        str | None, Field(description="A summary of the reasoning. It has no effect: the whole reasoning is sent.")
    ] = None
    generate_summary: Annotated[str | None, Field(description="The old name of `summary`.")] = None


Input = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of items",
    ),
]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, Field(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Field(max_length=MAX_METADATA_ENTRIES),
]


class ResponseRequest(FormatFields, GenerationBody):
    """A request for a response, with OpenAI's fields and vLLM's extra ones."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Tell me a story.", "max_output_tokens": 64}]})
    peers = peer_fields.RESPONSE
    # This class inherits the following fields, but they belong to other endpoints, so they are refused here.
    elsewhere: ClassVar[dict[str, PeerField]] = {
        "n": PeerField("/v1/chat/completions", (1,)),
        "max_tokens": PeerField("/v1/chat/completions", instead="max_output_tokens"),
        "max_completion_tokens": PeerField("/v1/chat/completions", instead="max_output_tokens"),
        "response_format": PeerField("/v1/chat/completions", instead="text.format"),
    }

    input: Annotated[Input, Field(description="A text, or the items of the conversation, oldest first.")]
    instructions: Annotated[
        str | None, Field(description="The first system message. Later responses do not inherit it.")
    ] = None
    previous_response_id: Annotated[
        ItemId | None, Field(description="The stored response that this one continues.")
    ] = None
    session: Annotated[
        SessionName | None,
        Field(description="A name for the conversation. The response continues the last one with this name."),
    ] = None
    max_output_tokens: Annotated[
        Annotated[int, Field(ge=1, le=2**31 - 1)] | None,
        Field(description="Maximum tokens of the reply, reasoning included. Default: the rest of the context."),
    ] = None
    text: Annotated[TextOptions | None, Field(description="The format of the reply's text.")] = None
    reasoning: Annotated[ReasoningOptions | None, Field(description="How much the model reasons.")] = None
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        Field(
            description="Functions and namespaces of functions. The header X-Warning names the types that are left out."
        ),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Field(description='"none", "auto", "required", one function, or {"type": "allowed_tools"}. Default: "auto".'),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Whether a reply may have several calls.")] = None
    include: Annotated[
        Annotated[list[str], Field(max_length=32, fail_fast=True)] | None,
        Field(description=f"`{LOGPROBS}` and `{ENCRYPTED_REASONING}` add data to the reply. Other values add none."),
    ] = None
    top_logprobs: Annotated[
        TopLogprobs | None,
        Field(description=f"Number of most likely tokens to return at each position. Needs `{LOGPROBS}` in `include`."),
    ] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field(description='"auto" leaves out the oldest messages if the conversation is too long for the context.'),
    ] = None
    store: Annotated[bool | None, Field(description="Keep the response for later requests. Default: true.")] = None
    metadata: Annotated[
        Metadata | None, Field(description="Up to 16 notes of the client, which are kept with the response.")
    ] = None

    max_tool_calls: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="A limit on calls of built-in tools. It has no effect: this server has no such tools."),
    ] = None
    background: Annotated[
        bool | None, unsupported(False), Field(description="Generate the response after the reply. Not supported.")
    ] = None
    conversation: Annotated[
        str | dict[str, Any] | None,
        unsupported(),
        Field(description="A stored conversation. Not supported; send `previous_response_id` or all items."),
    ] = None
    prompt: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A stored prompt template. Not supported.")
    ] = None
    context_management: Annotated[
        list[Any] | None, unsupported([]), Field(description="Summaries of long conversations. Not supported.")
    ] = None
    moderation: Annotated[
        dict[str, Any] | None, unsupported(), Field(description="A moderation of input and reply. Not supported.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields_of_other_endpoints(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, field in cls.elsewhere.items():
                if not field.is_neutral(data.get(name)):
                    hint = f"; send `{field.instead}` instead" if field.instead else ""
                    raise invalid(f"is a field of {field.of}{hint}", field=name, kind="not_supported_yet")
        return data

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        for position, name in enumerate(self.include or []):
            known = (LOGPROBS, ENCRYPTED_REASONING, *_OTHER_INCLUDES)
            if name not in known:
                raise invalid(f"is {name[:64]!r}; it must be one of {', '.join(known)}", field=f"include.{position}")
        if self.session is not None and self.previous_response_id is not None:
            raise invalid("has a last response of its own; do not send `previous_response_id`", field="session")
        if self.session is not None and self.store is False:
            raise invalid("needs `store`: true, because a session is made of stored responses", field="session")
        if self.top_logprobs and not self.includes(LOGPROBS):
            raise invalid(f"is only allowed with `{LOGPROBS}` in `include`", field="top_logprobs")
        return self

    def includes(self, name: str) -> bool:
        return name in (self.include or ())

    def _forms(self) -> Iterator[OutputFormat]:
        match self.text.format if self.text else None:
            case JsonObjectFormat():
                yield OutputFormat(kind="json_object", param="text.format")
            case JsonSchemaFormat(json_schema=schema):
                yield OutputFormat(kind="json_schema", value=schema, param="text.format.schema")
            case _:
                pass
        yield from super()._forms()

    @property
    def items(self) -> list[AnyInputItem]:
        """Returns the items of the field `input`. If the field is a text, the text becomes one message of the user."""
        return [Message(role="user", content=self.input)] if isinstance(self.input, str) else list(self.input)

    @property
    def declared_tools(self) -> list[AnyTool]:
        return list(self.tools or [])

    @property
    def choice(self) -> AnyToolChoice:
        return self.tool_choice or "auto"

    def reply_limit(self, *, default: int, context: int) -> int:
        return self.max_output_tokens or default
