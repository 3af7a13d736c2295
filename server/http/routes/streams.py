"""The routes of /v1/streams: read the rest of a stream, and end a stream."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from jamba_server.server.http.errors import tenant_of
from jamba_server.server.http.routes.replies import ERRORS, STREAM, json_response
from jamba_server.server.http.schemas.models import DeletedStream
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.streams.reply import StreamReply

router = APIRouter(tags=["generation"])

StreamId = Annotated[str, Path(description="The id in the header X-Stream-Id of the reply that made the stream.")]


@router.get("/v1/streams/{stream_id}", response_class=Response, responses=STREAM | ERRORS)
async def resume_stream(
    stream_id: StreamId,
    request: Request,
    services: ServicesOf,
    start: Annotated[
        int, Query(alias="from", ge=0, le=10**15, description="The number of the first event; the events count from 0.")
    ] = 0,
) -> Response:
    """Sends the events of a stream that was made with the header `X-On-Disconnect: continue`. Only the newest
    connection gets further events."""
    stream = services.streams.find(stream_id, tenant_of(request.scope))
    return StreamReply(stream, services.streams, start, services.config.send_timeout)


@router.delete("/v1/streams/{stream_id}", response_model=DeletedStream, responses=ERRORS)
async def delete_stream(stream_id: StreamId, request: Request, services: ServicesOf) -> Response:
    """Ends a stream. If its request still runs, the request is aborted."""
    services.streams.drop(services.streams.find(stream_id, tenant_of(request.scope)))
    return json_response(DeletedStream(id=stream_id))
