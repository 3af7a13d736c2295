"""The function `json_response` builds the JSON reply of a route. The table `ERRORS` has the error replies that the
OpenAPI document lists for routes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from jamba_server.server.http.schemas.base import ErrorReply

# The error replies that the OpenAPI document lists for a route. The module http/errors.py builds the error replies
# that are sent.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}
# An addition to the OpenAPI document, for routes that reply with server-sent events if the request has `stream`.
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def json_response(reply: BaseModel, *, status: int = 200) -> Response:
    return Response(reply.model_dump_json(), status_code=status, media_type="application/json")
