"""The JSON reply of a route, and the error replies that the OpenAPI document lists for it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from jamba_server.server.http.schemas.base import ErrorReply

# These error replies are declared for the OpenAPI document. `http/errors.py` makes the replies that are sent.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def json_response(reply: BaseModel, *, status: int = 200) -> Response:
    return Response(reply.model_dump_json(), status_code=status, media_type="application/json")
