"""The keywords of JSON Schema: which of them are enforced, which have no effect, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

Schema = Mapping[str, Any]

TYPES: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})

# Keywords that give a schema a name or an address. The server passes them on to llguidance unchanged.
IDENTIFIERS: Final = frozenset({"$schema", "$id", "$anchor", "id"})

# The keywords whose value is a schema, those whose value is a list of schemas, and those whose value is a map from
# names to schemas.
ONE_SCHEMA: Final = frozenset({"additionalProperties", "additionalItems", "items"})
SCHEMA_LISTS: Final = frozenset({"prefixItems", "allOf", "anyOf", "oneOf", "items"})
SCHEMA_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})

COUNTS: Final = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
NUMBERS: Final = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})

ENFORCED: Final = (
    ONE_SCHEMA
    | SCHEMA_LISTS
    | SCHEMA_MAPS
    | COUNTS
    | NUMBERS
    | frozenset({"type", "enum", "const", "required", "pattern", "format", "$ref"})
)


def _without(*others: str) -> Callable[[Any, Schema], bool]:
    """Returns a function for keywords that have no effect unless the schema also has one of the keywords `others`. The
    function returns true if the schema has none of these."""
    return lambda value, schema: not any(other in schema for other in others)


def _allows_all(value: Any, schema: Schema) -> bool:
    return value is True or value == {}


def _empty(value: Any, schema: Schema) -> bool:
    return value == {}


def _false(value: Any, schema: Schema) -> bool:
    return value is False


def _allows_all_names(value: Any, schema: Schema) -> bool:
    return _allows_all(value, schema) or value == {"type": "string"}


def _allows_none(value: Any, schema: Schema) -> bool:
    """Returns whether the keyword `contains` has no effect, because an array needs no item that fits its schema and may
    have any number of such items."""
    return schema.get("minContains") == 0 and "maxContains" not in schema


def _never(value: Any, schema: Schema) -> bool:
    return False


# The keywords that are refused. Each has a function that gets the keyword's value and the schema around it. If the
# function returns true, the keyword restricts nothing there, so it is left out and not refused.
REFUSED: Final[Mapping[str, Callable[[Any, Schema], bool]]] = MappingProxyType(
    {
        "not": _never,
        "if": _without("then", "else"),
        "then": _without("if"),
        "else": _without("if"),
        "contains": _allows_none,
        "minContains": lambda value, schema: "contains" not in schema or _allows_none(value, schema),
        "maxContains": _without("contains"),
        "uniqueItems": _false,
        "propertyNames": _allows_all_names,
        "dependentRequired": _empty,
        "dependentSchemas": _empty,
        "dependencies": _empty,
        "unevaluatedItems": _allows_all,
        "unevaluatedProperties": _allows_all,
        "$dynamicRef": _never,
        "$dynamicAnchor": _never,
        "$recursiveRef": _never,
        "$recursiveAnchor": _false,
    }
)
