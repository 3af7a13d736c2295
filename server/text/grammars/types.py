"""The classes that say what form a reply must have. The function `reply.build_grammar` makes one grammar for a whole
reply from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FormatKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
ToolStyle = Literal["jamba", "hermes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """The form that the content of a reply must have.

    The field `value` depends on `kind`: None for "json_object", the schema (a dictionary or a bool) for "json_schema",
    the pattern for "regex", a tuple of strings for "choice", and the text of the grammar for "lark". The field `param`
    is the name of the request's field that has the format, such as "response_format"; errors name this field.
    """

    kind: FormatKind
    value: Any = None
    param: str = "response_format"


class Function(Protocol):
    """A function that the model may call. `parameters` is the JSON schema of the function's arguments; {} allows any
    object. `param` is the name of the request's field that has this schema; errors name this field."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...
    @property
    def strict(self) -> bool: ...
    @property
    def param(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolGrammar:
    """The function calls that a reply may or must have.

    The mode "required" makes the reply consist of calls only, with at least one call. The mode "auto" allows ordinary
    text before, between and after calls; from the opening tag of a call on, the call must be one of a function in
    `functions`, with arguments that fit the function's schema. `functions` holds only the functions that may be called.
    If `parallel` is false, the reply has at most one call. The style is the model's own way of writing calls:
    "jamba" is `<tool_calls>[...]</tool_calls>`, and "hermes" is `<tool_call>{...}</tool_call>`.
    """

    functions: tuple[Function, ...]
    mode: Literal["required", "auto"]
    style: ToolStyle
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGrammar:
    """The model's thoughts at the beginning of a reply, between the tags `start` and `end`.

    If `opened` is true, the prompt ends after the opening tag, so the reply begins inside of the thoughts. If it is
    false, the reply may begin with the opening tag or have no thoughts at all. The text `separator` stands between the
    closing tag and the rest of the reply; the filter that splits reasoning from content has to remove it.
    """

    opened: bool
    start: str = "<think>"
    end: str = "</think>"
    separator: str = "\n\n"
