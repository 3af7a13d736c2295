"""Prepares the JSON schemas of the arguments of tool functions. Authors of such schemas often write type names of a
programming language, such as "dict"."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, cast

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.json_schema import check_size, prepare
from jamba_server.server.text.grammars.keywords import TYPES

# Maps type names that JSON Schema does not have, in lower case, to those of JSON Schema. None means that every value is
# allowed.
_TYPES: Final[Mapping[str, str | None]] = MappingProxyType(
    {
        "dict": "object",
        "map": "object",
        "hashmap": "object",
        "struct": "object",
        "list": "array",
        "tuple": "array",
        "set": "array",
        "arraylist": "array",
        "float": "number",
        "double": "number",
        "decimal": "number",
        "int": "integer",
        "long": "integer",
        "short": "integer",
        "byte": "integer",
        "bigint": "integer",
        "str": "string",
        "char": "string",
        "text": "string",
        "bool": "boolean",
        "none": "null",
        "any": None,
    }
)
_COMBINING: Final = frozenset({"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties", "if"})


def prepare_arguments(
    parameters: Mapping[str, Any], *, param: str, left_out: list[str] | None = None
) -> dict[str, Any]:
    """Returns the schema of a call's arguments for llguidance.

    Type names of programming languages are replaced by those of JSON Schema. Arguments that the schema does not declare
    are forbidden: if an object of the schema lists properties and does not mention others, the result allows no others.
    If there is no schema, the call has no arguments, as in OpenAI's API. If `left_out` is a list, keywords that are
    malformed or cannot be enforced are left out, and their paths are added to the list.

    Raises RequestRejected for a schema that is too large, and, if `left_out` is None, for one that is not valid or
    cannot be enforced.
    """
    check_size(parameters, param=param)
    schema = _mapped(parameters) if parameters else {"properties": {}}
    types = schema.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        if left_out is None:
            raise RequestRejected("The schema of a function's arguments must allow an object.", param=param)
        left_out.append("#/type")
        return any_arguments()
    schema["type"] = "object"
    if schema.get("properties") == {} and not _COMBINING & schema.keys():
        schema["additionalProperties"] = False
    return prepare(_closed(schema), param=param, left_out=left_out)


def any_arguments() -> dict[str, Any]:
    """Returns a schema that allows every JSON object."""
    return {"type": "object"}


def _mapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a schema in which type names of programming languages are replaced by those of JSON Schema."""
    mapped: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "type":
            types = _type(value)
            if types is not None:
                mapped["type"] = types
        elif keyword in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            mapped[keyword] = {name: _mapped_part(part) for name, part in cast("dict[str, Any]", value).items()}
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems", "items") and isinstance(value, list):
            mapped[keyword] = [_mapped_part(part) for part in cast("list[Any]", value)]
        elif keyword in ("items", "additionalProperties", "additionalItems", "not"):
            mapped[keyword] = _mapped_part(value)
        else:
            mapped[keyword] = value
    return mapped


def _mapped_part(part: Any) -> Any:
    return _mapped(cast("dict[str, Any]", part)) if isinstance(part, dict) else part


def _type(value: Any) -> Any:
    """Returns the name that JSON Schema has for a type, or None if the type allows every value."""
    if isinstance(value, list):
        types = [_type(name) for name in cast("list[Any]", value)]
        return None if None in types else list(dict.fromkeys(types))
    if not isinstance(value, str) or value in TYPES:
        return value
    name = value.lower()
    return name if name in TYPES else _TYPES.get(name, value)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a schema in which objects that list their properties allow no others (`additionalProperties` is
    false). Objects for which other keywords say which properties they may have are not changed."""
    properties = schema.get("properties")
    if isinstance(properties, dict) and properties:
        parts = cast("dict[str, Any]", properties)
        schema = {**schema, "properties": {name: _closed_part(part) for name, part in parts.items()}}
        if not _COMBINING & schema.keys():
            schema["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        schema = {**schema, "items": _closed(schema["items"])}
    return schema


def _closed_part(part: Any) -> Any:
    return _closed(cast("dict[str, Any]", part)) if isinstance(part, dict) else part
