"""The requests and replies of /v1/sessions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from jamba_server.server.http.schemas.base import MAX_PIN_SECONDS, Reply, RequestBody
from jamba_server.server.http.schemas.cache_report import JambaCache

SessionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


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
