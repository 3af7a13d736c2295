"""What becomes of unknown fields that are neither slips nor would change the answer (schemas/unknown.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import BaseModel
from starlette.requests import Request

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.schemas.unknown import unknown_fields
from jamba_server.server.http.services import Services

MAX_HEADER_CHARS = 512
MAX_NAME_CHARS = 64
_NOT_ASCII = re.compile(r"[^ -~]")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")


def settle_unknown_fields(body: BaseModel, request: Request, services: Services) -> None:
    """Every route that takes a body calls this first. Ignored fields are counted, and named in a header of the reply;
    with `--unknown-fields reject` they raise RequestRejected."""
    names = dict.fromkeys(_printable(path) for path in unknown_fields(body))
    if not names:
        return
    if services.config.unknown_fields == "reject":
        [first, *others] = names
        more = f", and so are {len(others)} more" if others else ""
        raise RequestRejected(
            f"{first} is not a field of this API{more}; this server runs with --unknown-fields reject.",
            param=first,
            code="unknown_parameter",
        )
    services.metrics.count_ignored_fields(names)
    add_reply_header(request, "X-Ignored-Fields", _listed(names))


def add_reply_header(request: Request, name: str, value: str) -> None:
    """The reply carries it whatever becomes of the request, streams and errors included (`RequestContext`)."""
    request.scope["state"].setdefault("reply_headers", {})[name] = value


def warn_of_bos(request: Request, services: Services) -> None:
    """Says what `Services.encode_prompt` made of a prompt."""
    bos = _NOT_ASCII.sub("?", services.tokenizer.named_tokens["bos_token"][:MAX_NAME_CHARS])
    add_reply_header(
        request, "X-Warning", f"the prompt begins with the text of {bos}: read as that token, and no second one added"
    )


def _printable(path: str) -> str:
    """A path without what could do harm in a header or a label."""
    return _NOT_IN_A_NAME.sub("?", path[:MAX_NAME_CHARS])


def _listed(names: Iterable[str]) -> str:
    """As many names as a header should have, and how many there are besides."""
    listed, left = "", list(names)
    while left and len(listed) + len(left[0]) + 2 <= MAX_HEADER_CHARS:
        listed += (", " if listed else "") + left.pop(0)
    return listed + (f", and {len(left)} more" if left else "")
