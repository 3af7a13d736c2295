"""The tools in requests to /v1/responses, and the field `tool_choice`.

A function of a namespace is shown to the model under a joined name, such as `crm__find_customer`. The class
`FunctionNames` maps each joined name to the function. A call in a reply has the namespace and the name of the function
in separate fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.schemas.base import RequestBody

MAX_TOOLS = 512  # maximum number of tools in a request, and in one namespace
MAX_NAME_CHARS = 128

ToolName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class FunctionTool(RequestBody):
    """A function that the client runs when the model calls it."""

    type: Literal["function"]
    name: Annotated[ToolName, Field(description="The name of the function.")]
    description: Annotated[str | None, Field(description="What the function does, for the model.")] = None
    parameters: Annotated[dict[str, Any] | None, Field(description="The JSON schema of the function's arguments.")] = (
        None
    )
    strict: Annotated[bool | None, Field(description="Whether the arguments must follow the schema.")] = None


class SkippedTool(BaseModel):
    """A tool that is not shown to the model, because neither this server nor the client can run the tool, or because
    its input is not JSON."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)], Field(description="The type of the tool.")
    ]

    @property
    def label(self) -> str:
        return self.type


def _tool_type(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if kind in ("function", "namespace") else "(other)"


NamespacedTool = Annotated[
    Annotated[FunctionTool, Tag("(function)")] | Annotated[SkippedTool, Tag("(other)")],
    Discriminator(lambda value: "(other)" if _tool_type(value) == "(namespace)" else _tool_type(value)),
]


class NamespaceTool(RequestBody):
    """Functions that belong together, such as those of one MCP server."""

    type: Literal["namespace"]
    name: Annotated[ToolName, Field(description="The name of the namespace.")]
    description: Annotated[str | None, Field(description="What the namespace is for. It has no effect.")] = None
    tools: Annotated[list[NamespacedTool], Field(max_length=MAX_TOOLS, fail_fast=True, description="The functions.")]


Tool = Annotated[
    Annotated[FunctionTool, Tag("(function)")]
    | Annotated[NamespaceTool, Tag("(namespace)")]
    | Annotated[SkippedTool, Tag("(other)")],
    Discriminator(_tool_type),
]
AnyTool = FunctionTool | NamespaceTool | SkippedTool


class DeclaredFunction(NamedTuple):
    """A function of a request. `param` is the name of the request's field that has the schema of the arguments."""

    tool: FunctionTool
    called: FunctionName
    param: str


class FunctionName(NamedTuple):
    """The name of a function as the client knows it. `namespace` is None for a function outside all namespaces."""

    namespace: str | None
    name: str


@dataclass(frozen=True, slots=True)
class FunctionNames:
    """Maps the names under which the model sees functions to the functions of a request.

    `functions` maps the name that the model sees to the function's declaration and to the name that the client uses.
    The field `skipped` has the types of the tools that are not shown to the model.
    """

    functions: dict[str, DeclaredFunction]
    skipped: tuple[str, ...]

    @classmethod
    def of(cls, tools: Sequence[AnyTool]) -> FunctionNames:
        """Returns the names of a request's functions. Raises RequestRejected if two functions have the same name."""
        functions: dict[str, DeclaredFunction] = {}
        skipped: list[str] = []
        for position, tool in enumerate(tools):
            members = tool.tools if isinstance(tool, NamespaceTool) else [tool]
            namespace = tool.name if isinstance(tool, NamespaceTool) else None
            for number, member in enumerate(members):
                path = f"tools.{position}.tools.{number}" if namespace is not None else f"tools.{position}"
                if isinstance(member, FunctionTool):
                    name = joined_name(namespace, member.name)
                    if name in functions:
                        raise RequestRejected(f"Two tools have the name {name!r}.", param=f"{path}.name")
                    called = FunctionName(namespace, member.name)
                    functions[name] = DeclaredFunction(member, called, f"{path}.parameters")
                elif isinstance(member, SkippedTool):
                    skipped.append(member.label)
        return cls(functions, tuple(dict.fromkeys(skipped)))

    def called(self, name: str) -> FunctionName:
        """Returns the name that the client uses for the function which the model has called under the name `name`."""
        return self.functions[name].called if name in self.functions else FunctionName(None, name)

    def matching(self, name: str) -> frozenset[str]:
        """Returns the names that the model sees of all functions with the client's name `name`, in any namespace."""
        return frozenset(key for key, function in self.functions.items() if name in (function.called.name, key))


def joined_name(namespace: str | None, name: str) -> str:
    """Returns the name under which a function of a namespace is shown to the model."""
    return name if namespace is None else f"{namespace.removesuffix('__')}__{name}"


class NamedFunction(RequestBody):
    """The value of `tool_choice` that names the function which the model must call."""

    type: Literal["function"]
    name: Annotated[ToolName, Field(description="The name of the function.")]


class AllowedTools(RequestBody):
    """The value of `tool_choice` that lists the only tools which the model may call."""

    type: Literal["allowed_tools"]
    mode: Annotated[Literal["auto", "required"], Field(description="Whether the model must call one of them.")]
    tools: Annotated[
        list[dict[str, Any]], Field(min_length=1, max_length=MAX_TOOLS, description="The types and names of the tools.")
    ]


def _choice_type(value: Any) -> str:
    if isinstance(value, str):
        return "(mode)"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})"


def _known_choice(value: Any) -> Any:
    if isinstance(value, dict) and (kind := value.get("type")) not in ("function", "allowed_tools"):
        why = f"has the type {str(kind)[:48]!r}; only 'function' and 'allowed_tools' are supported"
        raise PydanticCustomError("tool_choice_type", "{why}", {"why": why})
    if not isinstance(value, (str, dict, BaseModel)):
        raise PydanticCustomError("tool_choice_type", "{why}", {"why": "must be a string or a JSON object"})
    return value


ToolChoice = Annotated[
    Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("(mode)")]
        | Annotated[NamedFunction, Tag("(function)")]
        | Annotated[AllowedTools, Tag("(allowed_tools)")],
        Discriminator(_choice_type),
    ],
    BeforeValidator(_known_choice),
]
AnyToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


class AllowedNames(NamedTuple):
    """The meaning of a request's `tool_choice`: whether the model may or must call a function, and which functions it
    may call.

    `names` is None if the model may call all functions of the request.
    """

    mode: Literal["none", "auto", "required"]
    names: frozenset[str] | None


def allowed_names(choice: AnyToolChoice, names: FunctionNames) -> AllowedNames:
    """Returns the meaning of the field `tool_choice`. Raises RequestRejected if the field names a function that is not
    among the tools, or if the field requires a call and there is no function."""
    match choice:
        case NamedFunction():
            mode, allowed = "required", names.matching(choice.name)
            if not allowed:
                raise RequestRejected(
                    f"tool_choice names the function {choice.name!r}, which is not among the tools.",
                    param="tool_choice",
                )
        case AllowedTools():
            mode, allowed = choice.mode, frozenset[str]()
            for tool in choice.tools:
                if tool.get("type") == "function":
                    if not (found := names.matching(str(tool.get("name")))):
                        raise RequestRejected(
                            f"tool_choice allows the function {str(tool.get('name'))[:MAX_NAME_CHARS]!r}, which is not "
                            "among the tools.",
                            param="tool_choice.tools",
                        )
                    allowed |= found
        case _:
            mode, allowed = choice, None
    if mode == "required" and not (names.functions if allowed is None else allowed):
        raise RequestRejected(
            "tool_choice requires a call, but there is no function that the model could call.", param="tool_choice"
        )
    return AllowedNames(mode, allowed)
