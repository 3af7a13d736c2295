"""The requests and replies of /v1/batches."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from jamba_server.server.http.schemas.base import Reply, RequestBody
from jamba_server.server.http.schemas.files import MAX_LIFETIME_SECONDS, MIN_LIFETIME_SECONDS

# The paths that the requests of a batch may have. Each is the path of a route of this server.
Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
]
WINDOW = r"^[1-9][0-9]{0,6}[smhd]$"
MAX_WINDOW_SECONDS = 30 * 24 * 3600
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class OutputExpiresAfter(RequestBody):
    anchor: Annotated[Literal["created_at"], Field(description="The time from which `seconds` counts.")]
    seconds: Annotated[
        int,
        Field(
            ge=MIN_LIFETIME_SECONDS,
            le=MAX_LIFETIME_SECONDS,
            description="Seconds after which the files with the results are deleted.",
        ),
    ]


class BatchRequest(RequestBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
            ]
        }
    )

    input_file_id: Annotated[str, Field(max_length=128, description="The file with the requests, one per line.")]
    endpoint: Annotated[Endpoint, Field(description="The path of all requests.")]
    completion_window: Annotated[
        str,
        Field(
            pattern=WINDOW,
            description="Time after which the batch expires: a number with the unit s, m, h or d, such as 24h. At most "
            "30d.",
        ),
    ]
    metadata: Annotated[
        Metadata | None, Field(description="The client's own notes: up to 16 texts of up to 512 characters.")
    ] = None
    output_expires_after: Annotated[
        OutputExpiresAfter | None,
        Field(description="When the files with the results are deleted. Default: after 30 days."),
    ] = None

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, window: str) -> str:
        if window_seconds(window) > MAX_WINDOW_SECONDS:
            limit = MAX_WINDOW_SECONDS // _UNITS["d"]
            raise PydanticCustomError("window", "{why}", {"why": f'is "{window}"; it must be at most {limit}d'})
        return window


def window_seconds(window: str) -> int:
    """Returns the length in seconds of a window such as "24h"."""
    match = re.fullmatch(r"(\d+)([smhd])", window)
    assert match is not None, "the pattern of the field was checked"
    return int(match[1]) * _UNITS[match[2]]


class BatchRequestCounts(Reply):
    total: int
    completed: int
    failed: int


class BatchError(Reply):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(Reply):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchInputDetails(Reply):
    cached_tokens: int


class BatchOutputDetails(Reply):
    reasoning_tokens: int


class BatchUsage(Reply):
    input_tokens: int
    input_tokens_details: BatchInputDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class BatchObject(Reply):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchRequestCounts
    usage: BatchUsage
    metadata: dict[str, Any] | None


class BatchList(Reply):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str
    last_id: str
    has_more: bool
