"""The Jinja environment of chat templates: the dialect of transformers, in a sandbox with limits.

Templates come with checkpoints, that is from strangers. They get plain data and pure functions, no file, no network and
no name that begins with an underscore. Output, `range`, products and powers are bounded, so that a careless template
fails instead of filling the memory; one made to do harm can still pad a string, and should not be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from datetime import datetime
from typing import NoReturn, cast

import jinja2
from jinja2 import ext, meta, nodes, runtime, sandbox, utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser

from jamba_server.server.text.special_text import MARKS

MAX_OUTPUT_CHARS = 16 << 20


def create_environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    # `lipsum`, which makes text out of a number, is left out; `range` is bounded by the sandbox.
    functions = cast("dict[str, object]", environment.globals)
    del functions["lipsum"]
    functions["dict"] = _dict
    functions["namespace"] = _TemplateNamespace
    functions["raise_exception"] = _raise_exception
    functions["strftime_now"] = _strftime_now
    return environment


def undeclared_variables(environment: jinja2.Environment, template: str) -> frozenset[str]:
    """The names that the template reads before it has set them, in one branch at least."""
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks what a training run learns from. Here it means nothing: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Products are bounded and powers refused: either could fill the memory in one expression."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: runtime.Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            raise SecurityError("a chat template may not compute powers")
        for repeated, count in ((left, right), (right, left)):
            if isinstance(repeated, Sized) and isinstance(count, int) and len(repeated) * count > MAX_OUTPUT_CHARS:
                raise SecurityError(f"a product in the chat template is longer than {MAX_OUTPUT_CHARS} items")
        return super().call_binop(context, operator, left, right)


class _TemplateNamespace(utils.Namespace):
    """Names with underscores are what Python itself looks up on objects; a template may not forge them."""

    def __init__(self, initial: Mapping[str, object] | None = None, /, **attributes: object) -> None:
        values = {**(initial or {}), **attributes}
        for name in values:
            _refuse_underscore(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r} on a namespace")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; models are trained on plain JSON. Arguments as in transformers."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        for mark in MARKS:  # they are taken out of the text later, as characters
            text = text.replace(f"\\u{ord(mark):04x}", mark)
    return text


def _dict(*items: Mapping[str, object], **attributes: object) -> dict[str, object]:
    """A function in the place of the type, which has more to offer than a template should reach."""
    return dict(*items, **attributes)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
