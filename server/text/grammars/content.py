"""Builds the grammar rules for the content of a reply that must have a certain form, such as JSON or a regular
expression."""

from __future__ import annotations

from jamba_server.server.text.grammars.json_schema import inline, prepare
from jamba_server.server.text.grammars.lark import literal, regex
from jamba_server.server.text.grammars.regexes import for_full_match
from jamba_server.server.text.grammars.types import OutputFormat

_ANY_OBJECT = {"type": "object"}


def content_rules(format: OutputFormat) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the rules that define the grammar symbol `content`, and further grammars to which these rules refer by
    name.

    Raises RequestRejected for a JSON schema that cannot be enforced exactly.
    """
    match format.kind:
        case "json_object":
            return [f"content: {inline(_ANY_OBJECT)}"], []
        case "json_schema":
            return [f"content: {inline(prepare(format.value, param=format.param))}"], []
        case "regex":
            return ["content: CONTENT", f"CONTENT: {regex(for_full_match(format.value))}"], []
        case "choice":
            return ["content: CONTENT", f"CONTENT: {' | '.join(map(literal, format.value))}"], []
        case "lark":
            return ["content: @content_grammar"], [{"name": "content_grammar", "lark_grammar": format.value}]
