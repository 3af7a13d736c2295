"""Checks the lines of a batch's input file. Each line is a JSON object with an id, a method, a path and a body."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import msgspec

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.middleware import check_json

MAX_CUSTOM_ID_CHARS = 512
FIELDS = ("custom_id", "method", "url", "body")


class BadLine(Exception):
    """A line that cannot run. `custom_id` is the line's id if it has a valid one."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.custom_id = code, message, custom_id


class Line(msgspec.Struct, frozen=True):
    """A line that can run. `body` is the JSON of the request's body, as it stands in the line."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line is in its file: its number, from 0, its offset and its length in bytes."""

    number: int
    offset: int
    size: int


def places(file: BinaryIO, max_bytes: int) -> Iterator[tuple[Place, bytes]]:
    """Yields the lines of a file. The text of a blank line is empty. Of a line with more than `max_bytes` bytes, only
    the first `max_bytes` + 1 bytes are read into memory and yielded. A byte-order mark at the beginning of the file,
    which some programs write, belongs to no line."""
    number = 0
    offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(offset)
    while head := file.readline(max_bytes + 1):
        size, part = len(head), head
        while not part.endswith(b"\n") and (part := file.readline(64 * 1024)):
            size += len(part)
        yield Place(number, offset, size), head if head.strip() else b""
        number, offset = number + 1, offset + size


def check_line(text: bytes, urls: Collection[str], *, max_bytes: int) -> Line:
    """Returns a line whose url is one of `urls`. Raises BadLine if the line cannot run.

    The body of the request is not checked here but when the line runs, as for a request that a client sends.
    """
    if len(text) > max_bytes:
        raise BadLine("line_too_long", f"The line has more than {max_bytes} bytes (--max-body-bytes).")
    try:
        check_json(text, name="line")
        value: object = msgspec.json.decode(text)
    except RequestRejected as error:
        raise BadLine("invalid_json_line", str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadLine("invalid_json_line", f"The line is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadLine("invalid_json_line", "The line is not a JSON object.")
    fields = cast("dict[str, Any]", value)
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise BadLine("invalid_custom_id", f"custom_id is missing or no text of 1 to {MAX_CUSTOM_ID_CHARS} characters.")
    if problem := _problem(fields, urls):
        raise BadLine(*problem, custom_id)
    return msgspec.json.decode(text, type=Line)


def _problem(fields: dict[str, Any], urls: Collection[str]) -> tuple[str, str] | None:
    """Returns the code and the text of what is wrong with a line, or None."""
    for name in FIELDS:
        if name not in fields:
            return "missing_required_parameter", f"{name} is missing."
    if unknown := [name for name in fields if name not in FIELDS]:
        return "unknown_parameter", f"{unknown[0][:64]!r} is not a field of a line; the fields are {', '.join(FIELDS)}."
    if fields["method"] != "POST":
        return "invalid_method", f"method is {_shown(fields['method'])}; it must be POST."
    if not isinstance(fields["url"], str) or fields["url"] not in urls:
        return "invalid_url", f"url is {_shown(fields['url'])}; it must be {' or '.join(urls)}."
    if not isinstance(fields["body"], dict):
        return "invalid_body", "body is not a JSON object."
    if cast("dict[str, Any]", fields["body"]).get("stream"):
        return "unsupported_parameter", "body.stream is true; a batch has no streams."
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:63]}…"
