"""The interface through which templates are compiled and rendered.

The protocol `Renderer` has two implementations. `local.LocalRenderer` runs in the caller's process and has no limit of
time. `process.TemplateProcesses` sends the work to child processes, which use a `LocalRenderer`. This module does not
import Jinja, because the HTTP process does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

MAX_ERROR_CHARS = 500


class Compiled(msgspec.Struct, frozen=True):
    """The result of compiling a template: either the names of the variables that the template reads, or an error, which
    is a whole sentence."""

    variables: frozenset[str] = frozenset()
    error: str = ""


class Rendering(msgspec.Struct, frozen=True):
    """The result of rendering a template: either the text, or an error, which is a part of a sentence."""

    text: str = ""
    error: str = ""


class RendererStopped(Exception):
    """A template was not rendered, because it exceeded a limit or its process died. The message completes a sentence
    that begins with "The chat template"."""


class Renderer(Protocol):
    def compile(self, source: str) -> Compiled:
        """Compiles a template. Raises RendererStopped if that takes too long or too much memory."""
        ...

    def render(self, source: str, contexts: Sequence[Mapping[str, object]]) -> list[Rendering]:
        """Renders a template once for each mapping in `contexts`, which has the template's variables. The template must
        compile. Raises RendererStopped if the rendering takes too long or too much memory."""
        ...
