"""Turns llguidance's messages about a JSON schema into errors that name the keyword and its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.json_schema import Path, pointer, refusal

# Maps texts that occur in llguidance's error messages to the JSON Schema keywords that such a message can be about.
_SIGNS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("oneOf constraints", ("oneOf",)),
    ("not disjoint", ("patternProperties",)),
    ("circular references", ("$ref",)),
    ("Pointer '", ("$ref",)),
    ("Resource '", ("$ref", "$schema")),
    ("Unknown specification", ("$schema",)),
    ("multipleOf", ("multipleOf",)),
    ("Properties", ("minProperties", "maxProperties")),
    ("float range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("int range", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    ("regex", ("pattern", "patternProperties", "minimum", "maximum")),
    ("Regex", ("pattern", "patternProperties")),
)
_MAX_TRIALS = 8


def explain(message: str, schema: Any, *, param: str, fails: Callable[[dict[str, Any]], bool]) -> RequestRejected:
    """Returns the error for a schema that llguidance refuses with `message`.

    The function `fails` compiles a part of the schema and says whether llguidance also refuses this part. It is called
    at most 8 times, because each call takes time.
    """
    summary = message.splitlines()[0].removeprefix("at 1(8): ").removeprefix("failed to compile JSON schema: ")
    if "Unsatisfiable" in message or "NoExtension" in message:
        path = _locate(schema, None, fails)
        return RequestRejected(f"The schema at {pointer(path)[:300]} allows no value.", param=param)
    for sign, names in _SIGNS:
        if sign in message and (paths := [path for path, _ in _places(schema, names)]):
            if len(paths) == 1:
                return refusal(paths[0], param=param)
            return refusal(_locate(schema, names, fails), param=param)
    return RequestRejected(f"The schema cannot be enforced: {summary[:300]}.", param=param, code="unsupported_schema")


def _locate(schema: Any, names: tuple[str, ...] | None, fails: Callable[[dict[str, Any]], bool]) -> Path:
    """Returns the path of the keyword for which llguidance refuses the schema. The function looks for the most deeply
    nested part of the schema that has one of the keywords `names` and is refused by itself. If `names` is None, every
    part of the schema is considered, and the result is the path of the part."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
    places = list(_places(schema, names))
    places.sort(key=lambda place: -len(place[0]))
    for path, part in places[:_MAX_TRIALS]:
        if fails({**shared, **part}):
            return path
    return places[-1][0] if places else ()


def _places(
    node: Any, names: tuple[str, ...] | None, path: Path = (), *, is_schema: bool = True
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the path of each keyword in `names`, together with the part of the schema that has the keyword. If `names`
    is None, yields all parts that are schemas, with their paths."""
    if isinstance(node, list):
        for index, part in enumerate(cast("list[Any]", node)):
            yield from _places(part, names, (*path, index))
    if not isinstance(node, dict):
        return
    parts = cast("dict[str, Any]", node)
    if is_schema:
        if names is None:
            yield path, parts
        for name in names or ():
            if name in parts:
                yield (*path, name), parts
    for key, part in parts.items():
        if not (is_schema and key in ("enum", "const", "required", "default", "examples")):
            maps = is_schema and key in ("properties", "patternProperties", "$defs", "definitions")
            yield from _places(part, names, (*path, key), is_schema=not maps)
