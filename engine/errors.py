"""The exceptions that one package of this project raises and another package catches. Each error with which a request
can fail has an HTTP status.

JambaError
  x ConfigError            an option that cannot be satisfied: the message has its key, its value and the limit
    + CheckpointError      a model folder that is missing, truncated, incomplete or of another format
  x EngineError            errors that a request can get
    + RequestRejected      400: the request is wrong; `param` names the field
      - ContextTooLong     400 context_length_exceeded: prompt and reply do not fit into the context
      - NotSupportedYet    400: the field is known, but not implemented yet
      - ModelCannot        400 model_not_capable: the served model lacks what the endpoint needs
    + ModelNotFound        404 model_not_found: the request names another model than the served one
    + ResponseNotFound     404 response_not_found: no response of this id is stored for this API key
    + Overloaded           503 with Retry-After: the queue is full or the server is stopping
    + EngineFailed         500: the engine died each time that it ran this request
    + EngineDead           503: no engine process is running
      - EngineLoading      503 with Retry-After: the engine is still starting
"""

from __future__ import annotations

import json

# An error text shows at most this number of characters of a value, because some values have thousands of characters.
_VALUE_SHOWN = 100


def shown(value: object) -> str:
    """Returns a value of a JSON file as text for an error message. A long text is cut after _VALUE_SHOWN characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}..."


class JambaError(Exception):
    """The base class of the exceptions that the server or the engine raises to report a problem to the user."""


class ConfigError(JambaError):
    """An option that cannot be satisfied, so the server or the engine does not start."""


class CheckpointError(ConfigError):
    """A model folder that cannot be loaded."""


class EngineError(JambaError):
    """The base class of the errors with which a request can fail."""


class RequestRejected(EngineError):
    """A request that cannot be accepted. The attribute `param` names the field of the request that must be changed, and
    `code` is the error code of the OpenAI API."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(RequestRejected):
    """A prompt that leaves no room for a reply in the context or, without `has_reply`, is itself too long for it. The
    attribute `length` is the length of the prompt, and `limit` the maximum context length, both in tokens."""

    def __init__(self, *, length: int, limit: int, param: str = "messages", has_reply: bool = True) -> None:
        reply = ", including at least one token of the reply" if has_reply else ""
        super().__init__(
            f"This model's maximum context length is {limit} tokens{reply}; "
            f"the prompt has {length} tokens. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )
        self.length = length
        self.limit = limit


class NotSupportedYet(RequestRejected):
    """A request for a feature of OpenAI's API that this server does not have yet."""

    def __init__(self, feature: str, *, param: str | None = None) -> None:
        super().__init__(f"{feature} is not supported yet.", param=param, code="unsupported_parameter")


class ModelCannot(RequestRejected):
    """A request that the served model cannot answer, such as a request for text to a classifier."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_capable")


class ModelNotFound(EngineError):
    """A request whose field `model` names a model that this server does not serve."""

    def __init__(self, model: str, *, served: tuple[str, ...]) -> None:
        super().__init__(f"The model `{model}` does not exist; this server has: {', '.join(served)}.")
        self.model = model


class ResponseNotFound(EngineError):
    """A request that names a stored response of /v1/responses which does not exist or was made with another API key."""

    def __init__(self, response_id: str) -> None:
        super().__init__(f"No response with the id {response_id[:64]!r} is stored.")


class Overloaded(EngineError):
    """The server cannot take the request now. The client may try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(EngineError):
    """The engine cannot run this request. Usually the reason is that the engine process died each time it ran the
    request."""


class EngineDead(EngineError):
    """No engine process is running. The message says why."""


class EngineLoading(EngineDead):
    """The engine is still starting. The client may try again after `retry_after` seconds."""

    retry_after = 5
