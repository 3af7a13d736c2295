"""Ignores or refuses the unknown fields of a request, as the option `--unknown-fields` says.

The module schemas/unknown.py has already refused the unknown fields that look like a misspelling of a known field or
that would change the answer. This module decides about all other unknown fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.schemas.unknown import unknown_fields
from jamba_server.server.http.services import Services

MAX_HEADER_CHARS = 512
MAX_NAME_CHARS = 64
_NOT_ASCII = re.compile(r"[^ -~]")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")


def settle_unknown_fields(body: BaseModel, request: Request, services: Services) -> None:
    """Counts the unknown fields of a body in the metrics and lists their names in the reply's header X-Ignored-Fields.

    Raises RequestRejected instead if the server runs with `--unknown-fields reject` and the body has unknown fields.
    Every route that takes a body calls this function before it uses the engine.
    """
    names = dict.fromkeys(_printable(path) for path in unknown_fields(body))
    if not names:
        return
    if services.config.unknown_fields == "reject":
        [first, *others] = names
        more = f", and so are {len(others)} more" if others else ""
        raise RequestRejected(
            f"{first} is not a field of this API{more}. This server runs with --unknown-fields reject.",
            param=first,
            code="unknown_parameter",
        )
    services.metrics.count_ignored_fields(names)
    add_reply_header(request.scope, "X-Ignored-Fields", listed(names, MAX_HEADER_CHARS))


def ignore_field(name: str, scope: Scope, services: Services) -> None:
    """Counts, in the metrics, a request field that has no effect with this model, and lists its name in the reply's
    header X-Ignored-Fields."""
    services.metrics.count_ignored_fields([name])
    add_reply_header(scope, "X-Ignored-Fields", name)


def warn(text: str, scope: Scope) -> None:
    """Adds a sentence to the reply's header X-Warning."""
    add_reply_header(scope, "X-Warning", _NOT_ASCII.sub("?", text[:MAX_HEADER_CHARS]).strip(), separator="; ")


def add_reply_header(scope: Scope, name: str, value: str, *, separator: str = ", ") -> None:
    """Adds a header to the reply, even if the reply is an error or a stream. The class `middleware.RequestContext`
    sends the added headers. If the reply has the header already, the value is added to it."""
    headers: dict[str, str] = scope["state"].setdefault("reply_headers", {})
    headers[name] = f"{headers[name]}{separator}{value}" if name in headers else value


def warn_of_bos(request: Request, services: Services) -> None:
    """Adds the header X-Warning to the reply of a prompt that begins with the text of the begin-of-text token.

    The header says that the text was read as the token, and that no second begin-of-text token was added.
    """
    bos = _NOT_ASCII.sub("?", services.tokenizer.named_tokens["bos_token"][:MAX_NAME_CHARS])
    warn(
        f"the prompt begins with the text of {bos}, which was read as that token; no second one was added",
        request.scope,
    )


def _printable(path: str) -> str:
    """Returns the start of a field's path, with "?" for each character that is unsafe in a header or a label."""
    return _NOT_IN_A_NAME.sub("?", path[:MAX_NAME_CHARS]) or "?"


def listed(names: Iterable[str], max_chars: int) -> str:
    """Returns the names that fit into `max_chars` characters, as one text. If names are left out, the text ends with
    the number of these names."""
    text, left = "", list(names)
    while left and len(text) + len(left[0]) + 2 <= max_chars:
        text += (", " if text else "") + left.pop(0)
    return text + (f", and {len(left)} more" if left else "")
