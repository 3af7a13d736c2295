"""Prepares a client's JSON schema for llguidance, the library that makes replies follow a schema.

With a few exceptions, llguidance either follows a schema exactly or refuses the schema. The function `prepare` refuses
schemas that llguidance would not follow exactly, and keywords that llguidance does not know, with an error that names
the keyword and its path. It removes annotations, and translates patterns and formats to the regular expressions of
llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, cast
from urllib.parse import unquote

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.grammar.limits import MAX_REGEX_CHARS, MAX_SCHEMA_DEPTH, MAX_SCHEMA_NODES
from jamba_server.server.text.grammars import keywords
from jamba_server.server.text.grammars.regexes import from_ecma, looks_around
from jamba_server.server.text.grammars.string_formats import BUILT_IN, MAX_LENGTHS, PATTERNS, UNCONSTRAINED

Path = tuple[str | int, ...]

# The largest number up to which a float64 can represent every integer; llguidance computes in float64.
_MAX_EXACT = 2**53
# Smaller numbers are written with an exponent in JSON, and llguidance allows no exponents for numbers in a range.
_MIN_EXACT = 1e-6


def prepare(schema: Any, *, param: str, left_out: list[str] | None = None) -> dict[str, Any]:
    """Returns a schema for llguidance that allows the same values as `schema`.

    Raises RequestRejected for what cannot be enforced exactly. The argument `param` is the name of the request's field
    that has the schema. If the argument `left_out` is a list, keywords that are malformed or cannot be enforced are
    left out instead, and `oneOf` becomes `anyOf`, so the result may allow more values. The paths of these keywords are
    added to the list.
    """
    check_size(schema, param=param)
    walk = _Walk(param, left_out)
    prepared = walk.schema(schema, ())
    if left_out is None:
        walk.check_references()
    if isinstance(prepared, bool):
        if not prepared:
            raise RequestRejected("The schema is false, which allows no value.", param=param)
        return {}
    return prepared


def check_size(value: Any, *, param: str) -> None:
    """Raises RequestRejected for a schema that is nested too deeply or has too many values. It uses no recursion."""
    level: list[Any] = [value]
    nodes = depth = 0
    while level:
        nodes += len(level)
        depth += 1
        if nodes > MAX_SCHEMA_NODES:
            raise RequestRejected(f"The schema has more than {MAX_SCHEMA_NODES} JSON values.", param=param)
        # A schema inside a property is two levels of JSON deeper: "properties" and the property's name.
        if depth > 2 * MAX_SCHEMA_DEPTH:
            raise RequestRejected(
                f"The schema is nested more than {2 * MAX_SCHEMA_DEPTH} levels deep, starting at "
                f"{pointer(_deepest(value))[:200]}.",
                param=param,
            )
        level = [child for node in level for child in _children(node)]


def pointer(path: Iterable[str | int]) -> str:
    """Returns a JSON pointer in the form of a URL's fragment, such as "#/properties/age/minimum"."""
    return "#" + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return cast("dict[str, Any]", node).values()
    return cast("list[Any]", node) if isinstance(node, list) else ()


def _deepest(value: Any) -> Path:
    """Returns the beginning of the path to a deeply nested value, for an error message."""
    path: list[str | int] = []
    level = [((), value)]
    while level and len(path) < 8:
        level = [((*path, key), child) for path, node in level for key, child in _items(node)][:1000]
        path = list(level[0][0]) if level else path
    return tuple(path)


def _items(node: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(node, dict):
        yield from cast("dict[str, Any]", node).items()
    elif isinstance(node, list):
        yield from enumerate(cast("list[Any]", node))


class _Walk:
    """Walks once through a schema and prepares it. The object records the paths of all schemas inside the document, so
    that references to them can be checked at the end."""

    def __init__(self, param: str, left_out: list[str] | None) -> None:
        self._param, self._left_out = param, left_out
        # The JSON pointers of all schemas in the document, to which references may point.
        self._schemas: set[str] = set()
        self._references: list[tuple[str, Path]] = []
        self._has_ids = False

    def schema(self, node: Any, path: Path) -> dict[str, Any] | bool:
        self._schemas.add(pointer(path))
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            if self._left_out is not None:
                self._left_out.append(pointer(path))
                return True
            self._reject(path, f"is {_shown(node)}; a schema is an object, true or false")
        schema = cast("dict[str, Any]", node)
        prepared: dict[str, Any] = {}
        for keyword, value in schema.items():
            with self._tolerance((*path, keyword)):
                self._keyword(keyword, value, schema, (*path, keyword), prepared)
        with self._tolerance((*path, "format")):
            if (part := self._format(schema, (*path, "format"))) is not None:
                prepared["allOf"] = [*prepared.get("allOf", ()), part]
        if _counts_equal_names(prepared):
            with self._tolerance((*path, "minProperties")):
                self._refuse((*path, "minProperties"))
            del prepared["minProperties"]
        return prepared

    @contextmanager
    def _tolerance(self, path: Path) -> Generator[None]:
        """Context manager: if keywords may be left out, catches the error about the keyword at `path`, and records that
        this keyword is left out."""
        try:
            yield
        except RequestRejected:
            if self._left_out is None:
                raise
            self._left_out.append(pointer(path))

    def _keyword(self, keyword: str, value: Any, schema: keywords.Schema, path: Path, prepared: dict[str, Any]) -> None:
        """Translates one keyword of `schema` and adds the result to the dictionary `prepared`."""
        if (neutral := keywords.REFUSED.get(keyword)) is not None:
            if not neutral(value, schema):
                self._refuse(path)
        elif keyword in keywords.SCHEMA_LISTS and isinstance(value, list):
            items = cast("list[Any]", value)
            name = keyword
            if self._left_out is not None and keyword == "oneOf" and "anyOf" not in schema:
                self._left_out.append(pointer(path))
                name = "anyOf"
            prepared[name] = [self.schema(item, (*path, index)) for index, item in enumerate(items)]
        elif keyword == "additionalItems" and not isinstance(schema.get("items"), list):
            return  # `additionalItems` has no effect unless `items` is a list
        elif keyword in keywords.ONE_SCHEMA:
            prepared[keyword] = self.schema(value, path)
        elif keyword in keywords.SCHEMA_MAPS:
            prepared[keyword] = self._map(keyword, value, path)
        elif keyword in keywords.COUNTS:
            prepared[keyword] = self._count(value, path)
        elif keyword in keywords.NUMBERS:
            prepared[keyword] = value if isinstance(value, bool) else self._number(value, path)
        elif keyword == "pattern":
            prepared[keyword] = self._pattern(value, path)
        elif keyword == "type":
            prepared[keyword] = self._type(value, path)
        elif keyword in ("enum", "const"):
            prepared[keyword] = self._constant(value, path)
        elif keyword == "$ref":
            prepared[keyword] = self._reference(value, path)
        elif keyword == "required":
            prepared[keyword] = self._names(value, path)
        elif keyword in keywords.IDENTIFIERS:
            self._has_ids |= keyword != "$schema"
            prepared[keyword] = value

    def _map(self, keyword: str, value: Any, path: Path) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._reject(path, f"is {_shown(value)}; it must be an object")
        schemas = cast("dict[str, Any]", value)
        rewritten = self._pattern if keyword == "patternProperties" else lambda name, _: name
        return {rewritten(name, (*path, name)): self.schema(part, (*path, name)) for name, part in schemas.items()}

    def _count(self, value: Any, path: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_EXACT:
            self._reject(path, f"is {_shown(value)}; it must be a whole number from 0 to 2**53")
        if value != int(value):
            self._reject(path, f"is {_shown(value)}; it must be a whole number")
        return int(value)

    def _number(self, value: Any, path: Path) -> int | float:
        if not isinstance(value, int | float):
            self._reject(path, f"is {_shown(value)}; it must be a number")
        if value == 0:
            return 0  # this also turns -0.0 into 0, which is the same number
        if not _MIN_EXACT <= abs(value) <= _MAX_EXACT:
            self._reject(path, f"is {_shown(value)}; only 0 and sizes from {_MIN_EXACT} to 2**53 are enforced exactly")
        return int(value) if value == int(value) else value

    def _pattern(self, value: Any, path: Path) -> str:
        if not isinstance(value, str):
            self._reject(path, f"is {_shown(value)}; it must be a regular expression")
        if len(value) > MAX_REGEX_CHARS:
            self._reject(path, f"has {len(value)} characters; the limit is {MAX_REGEX_CHARS}")
        if self._left_out is not None and looks_around(value):
            self._refuse(path)
        return from_ecma(value)

    def _format(self, schema: keywords.Schema, path: Path) -> dict[str, Any] | None:
        """Returns a schema of the strings that the format of `schema` allows, or None if it allows every string."""
        name, types = schema.get("format"), schema.get("type", "string")
        if name is None or (types != "string" and not (isinstance(types, list) and "string" in types)):
            return None  # the keyword `format` restricts only strings
        if not isinstance(name, str):
            self._reject(path, f"is {_shown(name)}; it must be a string")
        if name in BUILT_IN:
            return {"format": name}
        if name in PATTERNS:
            length = {"maxLength": MAX_LENGTHS[name]} if name in MAX_LENGTHS else {}
            return {"pattern": f"^(?:{PATTERNS[name]})$", **length}
        if name not in UNCONSTRAINED:
            known = ", ".join(sorted(BUILT_IN | PATTERNS.keys()))
            self._reject(path, f"is {_shown(name)}, which cannot be enforced; the formats are {known}")
        return None

    def _type(self, value: Any, path: Path) -> str | list[str]:
        names: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
        for name in names:
            if not isinstance(name, str) or name not in keywords.TYPES:
                self._reject(path, f"is {_shown(name)}; the types are {', '.join(sorted(keywords.TYPES))}")
        return value

    def _constant(self, value: Any, path: Path) -> Any:
        """Checks a value of the keyword `const` or `enum` and returns it. Raises RequestRejected for a number that
        llguidance would not write exactly."""
        if isinstance(value, dict):
            return {key: self._constant(part, path) for key, part in cast("dict[str, Any]", value).items()}
        if isinstance(value, list):
            return [self._constant(part, path) for part in cast("list[Any]", value)]
        return value if value is None or isinstance(value, str | bool) else self._number(value, path)

    def _reference(self, value: Any, path: Path) -> str:
        if not isinstance(value, str):
            self._reject(path, f"is {_shown(value)}; it must be a string")
        self._references.append((value, path))
        return value

    def _names(self, value: Any, path: Path) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in cast("list[Any]", value)):
            self._reject(path, f"is {_shown(value)}; it must be a list of names")
        return cast("list[str]", value)

    def check_references(self) -> None:
        """Raises RequestRejected if a reference (`$ref`) points to something that is not a schema in this document."""
        if self._has_ids:
            return  # references are relative to the values of `$id`, and llguidance resolves and checks them
        for reference, path in self._references:
            if not reference.startswith("#"):
                self._reject(path, f"is {_shown(reference)}; this server does not fetch schemas from elsewhere")
            if reference.startswith("#/") and unquote(reference) not in self._schemas:
                self._reject(path, f"is {_shown(reference)}, where the document has no schema")

    def _refuse(self, path: Path) -> NoReturn:
        raise refusal(path, param=self._param)

    def _reject(self, path: Path, why: str) -> NoReturn:
        raise RequestRejected(f"The schema's {pointer(path)[:300]} {why}.", param=self._param)


def _counts_equal_names(prepared: Mapping[str, Any]) -> bool:
    """Returns whether `minProperties` demands more properties than `required` guarantees. Such a schema cannot be
    enforced, because llguidance would count two properties with the same name as two."""
    return prepared.get("minProperties", 0) > max(1, len(set(prepared.get("required", ()))))


def refusal(path: Path, *, param: str) -> RequestRejected:
    """Returns the error for a keyword that cannot be enforced. The last part of `path` is the keyword."""
    where = pointer(path)[:300]
    return RequestRejected(
        f"The schema's keyword `{str(path[-1])[:64]}` at {where} cannot be enforced exactly. Send a schema without it.",
        param=param,
        code="unsupported_schema",
    )


def _shown(value: Any) -> str:
    """Returns a value as JSON for an error message. A long text is cut."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def inline(schema: Mapping[str, Any], *, spaced: bool = False) -> str:
    """Returns a prepared schema in the form `%json {...}`, in which a grammar of llguidance can include a schema.

    The JSON that this grammar allows has no optional white space. If `spaced` is true, there is one space after each
    comma and colon, as Python's `json.dumps` writes JSON. The escapes \\uXXXX, which JSON needs for control characters,
    are not allowed where the schema allows both named and other properties. With such an escape, a model could write
    the name of a named property in another way, so that the grammar would take it for another property and not check
    its value.
    """
    escapes = 'nrbtf\\"' if any(_mixes_names(node) for node in _schemas(schema)) else 'nrbtf\\"u'
    options: dict[str, Any] = {"whitespace_flexible": False, "json_allowed_escapes": escapes}
    if spaced:
        options |= {"item_separator": ", ", "key_separator": ": "}
    return "%json " + json.dumps({"x-guidance": options, **schema}, ensure_ascii=False, separators=(",", ":"))


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Yields all JSON objects in a prepared schema: the schemas inside it, and maps from names to schemas."""
    if isinstance(value, dict):
        yield cast("dict[str, Any]", value)
    for child in _children(value):
        yield from _schemas(child)


def _mixes_names(schema: Mapping[str, Any]) -> bool:
    named = schema.get("properties") or schema.get("patternProperties") or schema.get("required")
    return bool(named) and schema.get("additionalProperties") is not False
