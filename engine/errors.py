"""Every error that crosses a layer.

JambaError
  x ConfigError            a start-up choice that cannot be met: key, value and limit in the message
    + CheckpointError      a model folder that is missing, truncated, foreign or incomplete
  x EngineError            what a request can meet
    + RequestRejected      400: the request itself; `param` names the field
      - ContextTooLong     400 context_length_exceeded
      - NotSupportedYet    400: known, but not built yet
    + ModelNotFound        404 model_not_found
    + Overloaded           503 with Retry-After: the queue is full or the server is stopping
    + EngineFailed         500: this request ended the engine whenever it ran
    + EngineDead           503: no engine process is running
      - EngineLoading      503 with Retry-After: there will be one soon
"""

from __future__ import annotations

import json

_VALUE_SHOWN = 100  # characters; a quantization_config may have thousands


def shown(value: object) -> str:
    """A value of a JSON file as an error shows it."""
    text = json.dumps(value)
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}..."


class JambaError(Exception):
    """Base of every error that this product raises on purpose."""


class ConfigError(JambaError):
    """A start-up setting that cannot be met."""


class CheckpointError(ConfigError):
    """A model folder that cannot be loaded."""


class EngineError(JambaError):
    """Base of the errors that a request can meet."""


class RequestRejected(EngineError):
    """The request is at fault; `param` is the field to change."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(RequestRejected):
    """Prompt and reply do not fit the context. `length` and `limit` count tokens."""

    def __init__(self, *, length: int, limit: int, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens, of which at least one is the reply's; "
            f"the prompt has {length} tokens. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )
        self.length = length
        self.limit = limit


class NotSupportedYet(RequestRejected):
    """A known feature of the API that this server does not have yet."""

    def __init__(self, feature: str, *, param: str | None = None) -> None:
        super().__init__(f"{feature} is not supported yet.", param=param, code="unsupported_parameter")


class ModelNotFound(EngineError):
    """`model` names something that is not served."""

    def __init__(self, model: str, *, served: tuple[str, ...]) -> None:
        super().__init__(f"The model `{model}` does not exist; this server has: {', '.join(served)}.")
        self.model = model


class Overloaded(EngineError):
    """No room now; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(EngineError):
    """The engine died each time that it ran this request."""


class EngineDead(EngineError):
    """No engine process is running; the message says why."""


class EngineLoading(EngineDead):
    """The engine has not been ready yet; try again after `retry_after` seconds."""

    retry_after = 5
