"""Compiles and renders templates in the caller's process."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import jinja2

from jamba_server.server.text.rendering.environment import MAX_OUTPUT_CHARS, create_environment, undeclared_variables
from jamba_server.server.text.rendering.renderer import MAX_ERROR_CHARS, Compiled, Rendering
from jamba_server.server.text.special_text import restore

# The exceptions that a template can raise when it is rendered with messages in a form that it does not expect.
_RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
# Jinja compiles a template to Python; Python's compiler raises these errors if the template is too complex.
_COMPILER_ERRORS = (MemoryError, OverflowError, RecursionError, SyntaxError, ValueError)
# The number of compiled templates that are cached. There is more than one template only if requests send templates of
# their own.
_KEPT_TEMPLATES = 8


class LocalRenderer:
    """Compiles and renders templates in this process, without a limit of time. Several threads may share it."""

    def __init__(self) -> None:
        self._environment = create_environment()
        self._template = lru_cache(_KEPT_TEMPLATES)(self._environment.from_string)

    def compile(self, source: str) -> Compiled:
        try:
            self._template(source)
            return Compiled(undeclared_variables(self._environment, source))
        except jinja2.TemplateSyntaxError as error:
            return Compiled(error=f"line {error.lineno}: {error.message}"[:MAX_ERROR_CHARS])
        except _COMPILER_ERRORS as error:
            return Compiled(error=" ".join(str(error).split())[:MAX_ERROR_CHARS] or "it is too complex")

    def render(self, source: str, contexts: Sequence[Mapping[str, object]]) -> list[Rendering]:
        template = self._template(source)
        return [_render(template, context) for context in contexts]


def _render(template: jinja2.Template, context: Mapping[str, object]) -> Rendering:
    try:
        return Rendering("".join(_bounded(template.generate(context))))
    except _RENDERING_ERRORS as error:
        return Rendering(error=_describe(error))


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_OUTPUT_CHARS:
            raise jinja2.TemplateRuntimeError(f"the prompt is longer than {MAX_OUTPUT_CHARS} characters")
        yield piece


def _describe(error: BaseException) -> str:
    """Returns the message of an exception and the line of the template that raised it. If the template itself raised
    the exception by calling `raise_exception`, the line is left out."""
    message = restore(str(error)[: 2 * MAX_ERROR_CHARS])[:MAX_ERROR_CHARS]
    if type(error) is jinja2.TemplateError:
        return message
    if isinstance(error, MemoryError):
        message = "it needs too much memory"
    # In tracebacks, a template that was compiled from a string has the file name "<template>".
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"{message} (line {lines[-1]} of the template)" if lines else message
