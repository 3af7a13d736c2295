"""The types of the values that options of the server have, with their ranges and choices."""

from __future__ import annotations

from typing import Annotated, Literal

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
