"""The lines of the files with the results of a batch, as OpenAI's API has them."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from jamba_server.server.http.batches.call import Outcome
from jamba_server.server.http.batches.table import Tokens
from jamba_server.server.http.line_separators import on_one_line


def reply_line(custom_id: str, outcome: Outcome) -> bytes:
    """Returns the line for a request that was run. Its status may be that of an error."""
    response = {
        "status_code": outcome.status,
        "request_id": outcome.request_id,
        "body": msgspec.Raw(outcome.body),
    }
    return _line(custom_id, response, None)


def error_line(custom_id: str | None, code: str, message: str) -> bytes:
    """Returns the line for a request that was not run."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    fields = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return on_one_line(msgspec.json.encode(fields)) + b"\n"


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """Chats and completions have other names for the same numbers than responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Reply(msgspec.Struct):
    usage: _Usage | None = None


def tokens_of(outcome: Outcome) -> Tokens:
    """Returns the numbers of tokens that a reply reports."""
    usage = msgspec.json.decode(outcome.body, type=_Reply).usage if outcome.ok else None
    if usage is None:
        return Tokens()
    prompt = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    reply = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Tokens(
        input=usage.prompt_tokens + usage.input_tokens,
        cached=prompt.cached_tokens,
        output=usage.completion_tokens + usage.output_tokens,
        reasoning=reply.reasoning_tokens,
    )
