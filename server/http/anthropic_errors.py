"""The form of error replies on the paths of Anthropic's API: `{"type": "error", "error": {"type", "message"},
"request_id"}`. All other paths have OpenAI's form."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from starlette.types import Scope

PATH = "/v1/messages"
OVERLOADED = 529  # the HTTP status with which Anthropic's API says that the server has too many requests

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def speaks_anthropic(scope: Scope) -> bool:
    """Returns whether the request's path is one of Anthropic's API, with or without the prefix of a proxy."""
    path: str = scope["path"]
    path = path.removeprefix(scope.get("root_path", "")).rstrip("/")
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_status(status: int, code: str | None) -> int:
    """Returns the HTTP status that an error has in Anthropic's API. The arguments are the status and the error code of
    the same error in OpenAI's API."""
    return OVERLOADED if code == "overloaded" else status


def anthropic_body(status: int, message: str, request_id: str, *, param: str | None) -> bytes:
    """Returns the body of an error reply in the form of Anthropic's API. This form has no member for the name of the
    wrong request field (`param`), so the name is added to the message if the message lacks it."""
    if param is not None and param not in message:
        message = f"{param}: {message}"
    general = "api_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error = {"type": _TYPES.get(status, general), "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})
