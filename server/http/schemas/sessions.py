"""The requests and replies of /v1/sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from jamba_server.server.http.schemas.base import MAX_PIN_SECONDS, Reply, RequestBody
from jamba_server.server.http.schemas.cache_report import JambaCache

# Why a file has no segments, or why a server has not taken them.
LeftOut = Literal["not_wanted", "no_disk_tier", "not_cached", "other_model", "shared_cache", "not_written"]

# The body of an import, for the OpenAPI document. The route reads it itself, while it arrives.
SESSION_FILE = "application/octet-stream"
SESSION_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {SESSION_FILE: {"schema": {"type": "string", "format": "binary"}}}}
}
# A name is a part of paths. HTTP clients take a part "." or ".." out of a path.
SessionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$")]


class SessionObject(Reply):
    """A session. `response_id` is the last response of its conversation, or null if it has none. `num_responses` counts
    the responses of the conversation that are stored. `pinned_until` is the time, in seconds since 1970, until which
    the conversation is protected from eviction, or null."""

    id: str
    object: Literal["session"] = "session"
    created_at: int
    response_id: str | None
    num_responses: int
    pinned_until: int | None


class ImportedSession(SessionObject):
    """A session that came from a file. `num_segments` segments of the prefix cache came with it, or none for the reason
    in `segments_left_out`."""

    num_segments: int
    segments_left_out: LeftOut | None


class SessionList(Reply):
    object: Literal["list"] = "list"
    data: list[SessionObject]


class PinRequest(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"seconds": 600}]})

    seconds: Annotated[
        Annotated[float, Field(gt=0, le=MAX_PIN_SECONDS)], Field(description="How long the pin lasts, in seconds.")
    ]


class PinnedSession(SessionObject):
    """A session whose conversation was computed, unless it was cached, and pinned. `jamba_cache.pinned_tokens` is 0 if
    pins would take more than their share of the memory."""

    jamba_cache: JambaCache | None


class ForkRequest(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "another-ending"}]})

    id: Annotated[SessionName, Field(description="The name of the new session.")]


class RewindRequest(RequestBody):
    model_config = ConfigDict(json_schema_extra={"examples": [{"responses": 1}]})

    responses: Annotated[
        Annotated[int, Field(ge=1)], Field(description="The number of responses to leave out at the end.")
    ] = 1


class DeletedSession(Reply):
    id: str
    object: Literal["session"] = "session"
    deleted: Literal[True] = True
