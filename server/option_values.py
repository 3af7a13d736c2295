"""The types of the values that options of the server have, with their ranges and choices."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Number = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
UnknownFields = Literal["ignore", "reject"]
MetricsNames = Literal["jamba", "vllm"]
Role = Literal["both", "prefill", "decode"]
ToolCallParser = Literal["auto", "jamba", "hermes", "none"]
ReasoningParser = Literal["auto", "none"]

# Pairs of two names for one number format: the name in torch or other servers, and the value of --dtype.
DTYPE_ALIASES = (
    ("fp16", "float16"),
    ("half", "float16"),
    ("bf16", "bfloat16"),
    ("fp32", "float32"),
    ("float", "float32"),
)


def is_http_url(text: str) -> bool:
    """Returns whether a text is the URL of an HTTP server, perhaps with a path, but without a query and a user."""
    try:
        parts = urlsplit(text)
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or a bracket is missing
        return False
    extra = parts.query or parts.fragment or "@" in parts.netloc
    return parts.scheme in ("http", "https") and has_place and not extra and text.isascii() and text.isprintable()
