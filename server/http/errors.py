"""Turns exceptions into error replies. The table `_TABLE` lists the HTTP status, error type and error code for each
class of exceptions.

Every error has OpenAI's form, `{"error": {"message", "type", "param", "code", "request_id"}}`, except on the paths of
Anthropic's API (see anthropic_errors.py). If no part of the reply has been sent yet, the error is the body of the
reply. If a stream has begun, the error is the last JSON event of the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, cast

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.engine.errors import (
    EngineDead,
    EngineError,
    EngineFailed,
    EngineLoading,
    ModelNotFound,
    Overloaded,
    RequestRejected,
    ResponseNotFound,
)
from jamba_server.server.http.anthropic_errors import anthropic_body, anthropic_status, speaks_anthropic
from jamba_server.server.http.findings import Finding, describe_finding, param_of

logger = logging.getLogger(__name__)


class RateLimited(EngineError):
    """A request was refused because of the rate limits of its API key. `kind` says which limit was exceeded: "requests"
    or "tokens"."""

    def __init__(self, message: str, *, kind: str, retry_after: int) -> None:
        super().__init__(message)
        self.type, self.retry_after = kind, retry_after


class DeadlineExceeded(EngineError):
    """A request whose reply was not complete within the time that the client gave."""


class SessionNotFound(EngineError):
    """A request that names a session which does not exist or was made with another API key."""


class StreamNotFound(EngineError):
    """A request that names a stream which is not kept or was made with another API key."""


class NotStored(EngineError):
    """A request that names a file, a batch or a segment which does not exist or belongs to another owner. `kind` is
    "file", "batch" or "segment"."""

    def __init__(self, kind: str, id_: str) -> None:
        super().__init__(f"There is no {kind} with the id {id_[:64]!r}.")
        self.code = f"{kind}_not_found"


class OtherModel(EngineError):
    """A request of a server that has another model, version, processor or configuration than this one."""


class EventsDropped(EngineError):
    """A request for events of a stream that were dropped, because newer events needed their memory."""


# What has happened to a request: the engine has it, or a reply has its first token.
Stage = Literal["submitted", "first_token"]
OnProgress = Callable[[Stage], None]

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that has disconnected; only the log and the metrics show it
MAX_SUB_ERRORS = 3
MAX_MESSAGE_CHARS = 1000  # longer messages are cut at the end; a message might quote a long value of the request

# Each row has a class of exceptions, and the HTTP status, error type and error code of their replies. If an exception
# has an attribute `code` or `type` that is not empty, the attribute replaces the error code or type of the row.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (RequestRejected, 400, "invalid_request_error", None),
    (ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    (ResponseNotFound, 404, "invalid_request_error", "response_not_found"),
    (SessionNotFound, 404, "invalid_request_error", "session_not_found"),
    (StreamNotFound, 404, "invalid_request_error", "stream_not_found"),
    (NotStored, 404, "invalid_request_error", None),
    (OtherModel, 409, "invalid_request_error", "other_model"),
    (EventsDropped, 410, "invalid_request_error", "events_dropped"),
    (Overloaded, 503, "service_unavailable_error", "overloaded"),
    (RateLimited, 429, "requests", "rate_limit_exceeded"),
    (DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (EngineLoading, 503, "service_unavailable_error", "engine_loading"),
    (EngineDead, 503, "service_unavailable_error", "engine_dead"),
    (EngineFailed, 500, "server_error", "engine_failed"),
    (ClientDisconnect, CLIENT_CLOSED_REQUEST, "invalid_request_error", "client_disconnected"),
)

# The replies to these errors have the header Retry-After.
RETRIED = Overloaded | EngineLoading | RateLimited

_STATUS_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}

_PYDANTIC_CODES = {
    "json_invalid": "invalid_json",
    "unknown_field": "unknown_parameter",
    "not_supported_yet": "unsupported_parameter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An error reply: its HTTP status, its headers and the fields of its body."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def short_message(self) -> str:
        long = len(self.message) > MAX_MESSAGE_CHARS
        return self.message[: MAX_MESSAGE_CHARS - 1] + "…" if long else self.message

    def status_for(self, scope: Scope) -> int:
        """Returns the HTTP status of the reply to the request with this ASGI scope."""
        return anthropic_status(self.status, self.code) if speaks_anthropic(scope) else self.status

    def body_for(self, scope: Scope) -> bytes:
        """Returns the body of the reply, in the form of the API to which the request's path belongs."""
        request_id = request_id_of(scope)
        if speaks_anthropic(scope):
            return anthropic_body(self.status_for(scope), self.short_message, request_id, param=self.param)
        error = {
            "message": self.short_message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "request_id": request_id,
        }
        return msgspec.json.encode({"error": error})


def describe(exc: Exception) -> Problem:
    """Returns the error reply for the exception `exc`.

    If this function does not know the class of the exception, the exception is logged. The reply then has status 500
    and no details.
    """
    if isinstance(exc, RequestValidationError):
        return _describe_validation(cast("Sequence[Finding]", exc.errors()))
    if isinstance(exc, HTTPException):
        return _describe_http(exc)
    for kind, status, type_, code in _TABLE:
        if isinstance(exc, kind):
            return Problem(
                status=status,
                message=str(exc),
                type=getattr(exc, "type", None) or type_,
                param="model" if isinstance(exc, ModelNotFound) else getattr(exc, "param", None),
                code=getattr(exc, "code", None) or code,
                headers={"Retry-After": str(exc.retry_after)} if isinstance(exc, RETRIED) else {},
            )
    logger.error("unexpected %s", type(exc).__name__, exc_info=exc)
    return Problem(
        status=500,
        message="The server had an unexpected error. Its log has the details under this request id.",
        type="server_error",
        code="internal_error",
    )


def error_response(exc: Exception, scope: Scope) -> Response:
    problem = describe(exc)
    return Response(
        problem.body_for(scope),
        status_code=problem.status_for(scope),
        headers=problem.headers,
        media_type="application/json",
    )


def request_id_of(scope: Scope) -> str:
    """Returns the id that the class `middleware.RequestContext` has given to the request."""
    state: dict[str, str] = scope["state"]
    return state["request_id"]


def tenant_of(scope: Scope) -> str:
    """Returns a name for the API key that the client sent: the key's name in --api-key-file, or a part of its hash.

    Returns "" if the server requires no key, or if the request's path requires no key.
    """
    state: dict[str, str] = scope["state"]
    return state.get("tenant", "")


def is_background(scope: Scope) -> bool:
    """Returns whether a request is a line of a batch, which runs in the background. The server makes the scopes of such
    requests itself, so no client can send one."""
    return "background" in scope["state"]


def progress_hook(scope: Scope) -> OnProgress | None:
    """Returns the function that is told of the progress of a line of a batch, or None for other requests."""
    return scope["state"].get("on_progress")


def _describe_http(exc: HTTPException) -> Problem:
    status = exc.status_code
    server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return Problem(
        status=status,
        message=exc.detail,
        type="server_error" if server_error else "invalid_request_error",
        code=_STATUS_CODES.get(status),
        headers=exc.headers or {},
    )


def _describe_validation(errors: Sequence[Finding]) -> Problem:
    """Returns one error reply, whose message has the first MAX_SUB_ERRORS of pydantic's validation errors."""
    shown = [describe_finding(error) for error in errors[:MAX_SUB_ERRORS]]
    if len(errors) > len(shown):
        shown.append(f"and {len(errors) - len(shown)} more")
    message = "; ".join(shown)
    return Problem(
        status=400,
        message=message if message.endswith("?") else f"{message}.",
        param=param_of(errors[0]),
        code=_PYDANTIC_CODES.get(errors[0]["type"]),
    )
