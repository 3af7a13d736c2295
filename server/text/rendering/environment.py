"""Creates the Jinja environment for chat templates: a sandbox that follows the library transformers and limits sizes.

Templates come with checkpoints, so their authors are not trusted. A template gets plain data and pure functions. It can
reach no file, no network and no name that begins with an underscore. Its output, `range` and products are bounded and
powers are refused, so a careless template fails instead of filling the memory. A malicious template can still loop for
years, or fill the memory by padding a string. Therefore the server renders templates in a process of its own
(`rendering/process.py`), which has limits of time and memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sized
from datetime import datetime
from typing import NoReturn, cast

import jinja2
from jinja2 import ext, meta, nodes, runtime, sandbox, utils
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser

from jamba_server.server.text.special_text import MARK

MAX_OUTPUT_CHARS = 16 << 20
# Matches the JSON escape of a mark of special_text.py. A mark is the character U+FDD0, which another noncharacter of
# Unicode may follow. If an even number of backslashes precedes the escape, these backslashes are part of the text.
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd0(?:\\u(fdd[1-9a-f]|fde[0-9a-f]))?")


def create_environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    # `lipsum` is removed because it can produce text of any length. The function `range` is limited by Jinja's sandbox.
    functions = cast("dict[str, object]", environment.globals)
    del functions["lipsum"]
    functions["dict"] = _dict
    functions["namespace"] = _TemplateNamespace
    functions["raise_exception"] = _raise_exception
    functions["strftime_now"] = _strftime_now
    return environment


def undeclared_variables(environment: jinja2.Environment, template: str) -> frozenset[str]:
    """Returns the names of the variables that the template can read without having set them."""
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


class _GenerationTag(ext.Extension):
    """Renders the content of the tag `{% generation %}` as if the tag were absent. The tag has a meaning only in
    training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """A Jinja sandbox that limits the length of products such as "a" * n, and refuses powers. Otherwise a single
    product or power could fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: runtime.Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            raise SecurityError("a chat template may not compute powers")
        for repeated, count in ((left, right), (right, left)):
            if isinstance(repeated, Sized) and isinstance(count, int) and len(repeated) * count > MAX_OUTPUT_CHARS:
                raise SecurityError(f"a product in the chat template is longer than {MAX_OUTPUT_CHARS} items")
        return super().call_binop(context, operator, left, right)


class _TemplateNamespace(utils.Namespace):
    """A Jinja namespace that refuses names beginning with an underscore.

    Python itself looks up such names on objects, so a template must not be able to define them.
    """

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
    """The filter `tojson`: writes a value as JSON without HTML escapes, like the text on which models were trained.
    Jinja's own filter `tojson` escapes characters for HTML.

    The arguments are those of the filter in transformers.
    """
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        # Later code finds the marks of special_text.py only as characters, so their JSON escapes are turned back into
        # characters.
        text = _ESCAPED_MARK.sub(lambda found: found[1] + MARK + (chr(int(found[2], 16)) if found[2] else ""), text)
    return text


def _dict(*items: Mapping[str, object], **attributes: object) -> dict[str, object]:
    """Replaces Python's type `dict` in templates, since a template must not reach the attributes of a type."""
    return dict(*items, **attributes)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
