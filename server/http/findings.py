"""Turns pydantic's validation errors ("findings") into sentences that name the field, its value and the limit.

Every sentence begins with the path of the field. The table `_SENTENCES` gives the predicate, which is the part of the
sentence after the path, such as "is 3; it must be at most 2".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

MAX_NAME_CHARS = 64
MAX_VALUE_CHARS = 48

Finding = Mapping[str, Any]  # one validation error, as pydantic's `errors()` lists it


def describe_finding(finding: Finding) -> str:
    """Returns a sentence that tells the client what is wrong, without the full stop at the end of the sentence."""
    if finding["type"] == "json_invalid":
        return f"The body is not valid JSON at position {finding['loc'][-1]}: {finding['ctx']['error']}"
    say = _SENTENCES.get(finding["type"])
    predicate = say(finding) if say is not None else _other(finding)
    return f"{param_of(finding) or 'The body'} {predicate}"


def param_of(finding: Finding) -> str | None:
    """Returns the path of the field, such as `messages.0.content`, or None if the finding is about the whole body.

    In pydantic, the location of an error also has the tags of union types, such as "(list)". The returned path has no
    such tags.
    """
    if finding["type"] == "json_invalid":
        return None
    parts = [str(part) for part in finding["loc"][1:]]
    # If a validator of a whole object raised the error, "loc" ends at the object, and "ctx" names the field.
    if "field" in finding.get("ctx", {}):
        parts.append(finding["ctx"]["field"])
    return ".".join(part[:MAX_NAME_CHARS] for part in parts if not part.startswith("(")) or None


def short_json(value: object) -> str:
    """Returns a short text for a JSON value in an error message.

    The text of a list is "a list", and the text of an object is "an object". A long string is cut at its end.
    """
    match value:
        case None | bool() | float():
            return json.dumps(value)
        case int():
            return str(value) if abs(value) < 10**MAX_VALUE_CHARS else "a number of too many digits"
        case str():
            text = json.dumps(value[:MAX_VALUE_CHARS], ensure_ascii=False)
            return text if len(value) <= MAX_VALUE_CHARS else f'{text[:-1]}…"'
        case Mapping():
            return "an object"
        case Sequence():
            return "a list"
        case _:
            return "something else"


def _must_be(what: str) -> Callable[[Finding], str]:
    return lambda finding: f"is {short_json(finding['input'])}; it must be {what}"


def _bound(words: str, key: str) -> Callable[[Finding], str]:
    def say(finding: Finding) -> str:
        return f"is {short_json(finding['input'])}; it must be {words} {_number(finding['ctx'][key])}"

    return say


def _number(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _too_short(finding: Finding) -> str:
    ctx = finding["ctx"]
    return f"has {_count(ctx.get('actual_length', 0), 'item')}; it needs at least {ctx['min_length']}"


def _too_long(finding: Finding) -> str:
    limit, length = finding["ctx"]["max_length"], finding["ctx"].get("actual_length")
    return f"has {'more' if length is None else length} items; at most {limit} are allowed"


def _string_too_short(finding: Finding) -> str:
    if not finding["input"]:
        return "is empty; it needs at least one character"
    return f"is {short_json(finding['input'])}; it needs at least {finding['ctx']['min_length']} characters"


def _string_too_long(finding: Finding) -> str:
    return f"has {len(finding['input'])} characters; at most {finding['ctx']['max_length']} are allowed"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _other(finding: Finding) -> str:
    """Returns the predicate (the sentence without the field's path) for a finding that has no entry in _SENTENCES.

    Errors of this server's own validators have their predicate in `ctx["why"]`. All other findings get a general
    predicate.
    """
    own = cast("dict[str, str]", finding.get("ctx") or {}).get("why")
    return own or f"is {short_json(finding.get('input'))}, which is not allowed here"


def _custom(finding: Finding) -> str:
    """Returns the message of the server's own validator. A message that only says what the value must be gets the value
    before it."""
    message: str = finding["msg"]
    if not message.startswith("must be "):
        return message
    match finding["input"]:
        case {"type": kind}:
            return f"is an object of the type {short_json(kind)}; it {message}"
        case value:
            return f"is {short_json(value)}; it {message}"


_SENTENCES: Mapping[str, Callable[[Finding], str]] = {
    "missing": lambda finding: "is required",
    "model_type": _must_be("a JSON object"),
    "model_attributes_type": _must_be("a JSON object"),
    "dict_type": _must_be("a JSON object"),
    "list_type": _must_be("a list"),
    "string_type": _must_be("a string"),
    "string_unicode": _must_be("a string of valid Unicode"),
    "bool_type": _must_be("true or false"),
    "int_type": _must_be("a whole number"),
    "int_from_float": _must_be("a whole number"),
    "int_parsing": _must_be("a whole number"),
    "int_parsing_size": _must_be("a whole number of at most 64 bits"),
    "float_type": _must_be("a number"),
    "float_parsing": _must_be("a number"),
    "finite_number": _must_be("a finite number"),
    "none_required": _must_be("null"),
    "greater_than": _bound("above", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("below", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "too_short": _too_short,
    "too_long": _too_long,
    "string_too_short": _string_too_short,
    "string_too_long": _string_too_long,
    "string_pattern_mismatch": lambda finding: (
        f"is {short_json(finding['input'])}; it must match {finding['ctx']['pattern']}"
    ),
    "literal_error": lambda finding: f"is {short_json(finding['input'])}; it must be {finding['ctx']['expected']}",
    # This server's own validators raise errors of the following kinds. The message of such an error is the predicate.
    "stop_type": _custom,
    "content_type": _custom,
    "prompt_type": _custom,
    "schema_type": _custom,
    "format_type": _custom,
    "tool_choice_type": _custom,
    "token_id": _custom,
    "blank": _custom,
}
