"""The tools and the options of a request for /v1/messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jamba_server.server.http.schemas.base import RequestBody, invalid
from jamba_server.server.http.schemas.messages.content import Mark

MAX_NAME_CHARS = 128  # maximum number of characters in a tool's name, as in Anthropic's API
# Maximum number of tools in a request; it is large, because agents declare all tools of all MCP servers that they use.
MAX_TOOLS = 512
Name = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{MAX_NAME_CHARS}}}$")]


class ToolDefinition(RequestBody):
    """A function that the model may call. Tools that Anthropic defines have another `type` than "custom"; they are left
    out of the prompt."""

    type: Annotated[
        Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None,
        Field(description='"custom", which is the default. The server skips tools of other types and says so.'),
    ] = None
    name: Annotated[Name, Field(description="The name with which the model calls the tool.")]
    description: Annotated[str | None, Field(description="What the tool does, for the model to read.")] = None
    input_schema: Annotated[
        dict[str, Any] | None, Field(description="The JSON schema of the arguments. Custom tools need it.")
    ] = None
    strict: Annotated[bool | None, Field(description="Whether a grammar makes the arguments match the schema.")] = None
    cache_control: Mark = None

    @property
    def is_custom(self) -> bool:
        return self.type in (None, "custom")

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.is_custom and self.input_schema is None:
            raise invalid("is required", field="input_schema")
        return self


class ToolChoice(RequestBody):
    """Says whether the model must call a tool. The type "any" requires at least one call, and "tool" requires a call of
    the named tool."""

    type: Annotated[
        Literal["auto", "any", "tool", "none"], Field(description="Whether the model may or must call a tool.")
    ]
    name: Annotated[Name | None, Field(description="The tool that the model must call.")] = None
    disable_parallel_tool_use: Annotated[bool | None, Field(description="Allow at most one call.")] = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise invalid('is required for the type "tool"', field="name")
        return self


class Thinking(RequestBody):
    """Says whether a model that can reason does so before its reply."""

    type: Annotated[
        Literal["enabled", "disabled", "adaptive", "between_tools"],
        Field(description="Whether the model reasons before its reply."),
    ]
    budget_tokens: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="Maximum tokens of the reasoning. The type `enabled` needs it."),
    ] = None
    display: Annotated[
        Literal["summarized", "omitted"] | None, Field(description="Whether the reply shows the reasoning.")
    ] = None

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.type == "enabled" and self.budget_tokens is None:
            raise invalid('is required for the type "enabled"', field="budget_tokens")
        return self

    @property
    def is_on(self) -> bool:
        return self.type in ("enabled", "adaptive")


class JsonFormat(RequestBody):
    """The option that makes the reply JSON which matches a schema."""

    type: Literal["json_schema"]
    # The attribute is not called `schema` like the JSON field, because pydantic's classes have a method of that name.
    json_schema: Annotated[dict[str, Any], Field(alias="schema", description="The JSON schema.")]


class OutputConfig(RequestBody):
    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None,
        Field(description="How much the model reasons, for chat templates that have such a variable."),
    ] = None
    format: Annotated[JsonFormat | None, Field(description="The JSON schema that the reply must match.")] = None
