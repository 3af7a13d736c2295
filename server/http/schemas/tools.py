"""The tools of a chat completion request: the declared functions, the field `tool_choice`, and the tool calls of
earlier messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from jamba_server.engine.validation import INT32_MAX
from jamba_server.server.http.schemas.base import RequestBody, invalid

MAX_TOOLS = 128  # maximum number of tools in a request, as in OpenAI's API
MAX_TOOL_CALLS = 1024  # maximum number of tool calls in one message of a conversation
MAX_NAME_CHARS = 128

# The names of functions may have the characters that OpenAI allows. Dots are also allowed, as in vLLM and in many data
# sets, and so are colons and slashes, which MCP servers use.
FunctionName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_.:/-]{{1,{MAX_NAME_CHARS}}}$")]
ToolMode = Literal["none", "auto", "required"]


class FunctionDefinition(RequestBody):
    """A function that the model may call."""

    name: Annotated[
        FunctionName,
        Field(description="The function's name: letters, digits and the characters _ - . : /, at most 128."),
    ]
    description: Annotated[str | None, Field(description="What the function does, for the model to read.")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        Field(description="The JSON schema of the arguments, which are an object. Default: any object."),
    ] = None
    strict: Annotated[
        bool | None, Field(description="Refuse the request if the schema of the arguments cannot be enforced exactly.")
    ] = None


class FunctionTool(RequestBody):
    """A tool of the type "function"."""

    type: Annotated[Literal["function"], Field(description='Always "function".')]
    function: Annotated[FunctionDefinition, Field(description="The function.")]


class OtherTool(RequestBody):
    """A tool of a type that this server does not support. The prompt leaves the tool out, and the reply's header
    X-Warning says so."""

    model_config = ConfigDict(extra="ignore")

    type: Annotated[str, Field(max_length=256, description="Another type, such as `custom`.")]


def _tool_kind(value: object) -> str | None:
    """Returns the tag by which pydantic chooses the class that validates a tool. A tool without a type is validated as
    a function."""
    if not isinstance(value, dict):
        return "(function)"
    return "(function)" if value.get("type", "function") == "function" else "(other)"


Tool = Annotated[
    Annotated[FunctionTool, Tag("(function)")] | Annotated[OtherTool, Tag("(other)")], Discriminator(_tool_kind)
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionReference(RequestBody):
    """The name of one of the request's functions."""

    name: Annotated[str, Field(description="The name of a function in `tools`.")]


class NamedTool(RequestBody):
    """The value of `tool_choice` that names the function which the model must call."""

    type: Annotated[Literal["function"], Field(description='Always "function".')]
    function: Annotated[FunctionReference, Field(description="The function.")]


class AllowedTools(RequestBody):
    """A list of functions that the model may call, and whether it may or must call one of them."""

    mode: Annotated[
        Literal["auto", "required"], Field(description="Whether the model may call or must call one of the functions.")
    ]
    tools: Annotated[
        list[NamedTool],
        Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True, description="The functions that may be called."),
    ]


class AllowedToolsChoice(RequestBody):
    """The value of `tool_choice` that allows only some of the request's functions."""

    type: Annotated[Literal["allowed_tools"], Field(description='Always "allowed_tools".')]
    allowed_tools: Annotated[AllowedTools, Field(description="The functions that may be called.")]


def _choice_kind(value: object) -> str | None:
    """Returns the tag by which pydantic chooses the class that validates the field `tool_choice`."""
    if isinstance(value, dict):
        return "(allowed)" if value.get("type") == "allowed_tools" else "(named)"
    return "(mode)" if isinstance(value, str) else None


ToolChoice = Annotated[
    Annotated[ToolMode, Tag("(mode)")]
    | Annotated[NamedTool, Tag("(named)")]
    | Annotated[AllowedToolsChoice, Tag("(allowed)")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice_type",
        custom_error_message='must be "none", "auto", "required" or an object that names functions',
    ),
]


def functions_in(tools: Sequence[FunctionTool | OtherTool] | None) -> list[FunctionDefinition]:
    return [tool.function for tool in tools or () if isinstance(tool, FunctionTool)]


def mode_and_allowed(
    choice: ToolMode | NamedTool | AllowedToolsChoice | None,
) -> tuple[ToolMode, frozenset[str] | None]:
    """Returns the mode of the field `tool_choice` and the names of the functions that may be called. If None takes the
    place of the names, all functions of the request may be called."""
    match choice:
        case None:
            return "auto", None
        case NamedTool():
            return "required", frozenset({choice.function.name})
        case AllowedToolsChoice(allowed_tools=allowed):
            return allowed.mode, frozenset(tool.function.name for tool in allowed.tools)
        case mode:
            return mode, None


def check_tools(
    tools: Sequence[FunctionTool | OtherTool] | None, choice: ToolMode | NamedTool | AllowedToolsChoice | None
) -> None:
    """Raises a validation error of pydantic if two functions have the same name, or if `tool_choice` names an unknown
    function."""
    names = [function.name for function in functions_in(tools)]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(f"has the function {twice!r} twice", field="tools")
    mode, allowed = mode_and_allowed(choice)
    if mode == "required" and not names:
        raise invalid("requires a call, but `tools` has no functions", field="tool_choice")
    if unknown := sorted((allowed or frozenset()) - set(names)):
        raise invalid(
            f"names the function {unknown[0][:MAX_NAME_CHARS]!r}, which is not in `tools`", field="tool_choice"
        )


# Tool calls in a conversation -----------------------------------------------------------------------------------------


def _arguments(value: object) -> object:
    """Returns the arguments of an earlier tool call as text. Some clients send the arguments as JSON text, others as an
    object. The text need not be valid JSON: the last call of a reply that `max_tokens` has cut off is incomplete, and
    clients send it back."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "{}" if value == "" else value


class CalledFunction(RequestBody):
    """The name and the arguments of a function that an earlier reply has called."""

    name: Annotated[str, Field(min_length=1, max_length=256, description="The function's name.")]
    arguments: Annotated[
        str,
        BeforeValidator(_arguments),
        Field(description="The arguments: the JSON text of an object. The model reads any other text unchanged."),
    ] = "{}"


class EarlierCall(RequestBody):
    """A tool call of an earlier reply."""

    id: Annotated[
        Annotated[str, Field(max_length=256)] | None, Field(description="The id of the call, which its result repeats.")
    ] = None
    type: Annotated[Literal["function"], Field(description='Always "function".')] = "function"
    function: Annotated[CalledFunction, Field(description="The function and its arguments.")]
    index: Annotated[
        Annotated[int, Field(ge=0, le=INT32_MAX)] | None,
        Field(description="The number of the call in a stream. It has no effect."),
    ] = None

    def to_template(self) -> dict[str, object]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id or "", "type": "function", "function": function}


EarlierCalls = Annotated[list[EarlierCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)]
