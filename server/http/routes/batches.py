"""The routes of /v1/batches: create, list, retrieve and cancel."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.batches.table import Batch, Record
from jamba_server.server.http.errors import NotStored, tenant_of
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.batches import (
    BatchError,
    BatchErrors,
    BatchInputDetails,
    BatchList,
    BatchObject,
    BatchOutputDetails,
    BatchRequest,
    BatchRequestCounts,
    BatchUsage,
    window_seconds,
)
from jamba_server.server.http.services import ServicesOf
from jamba_server.server.http.unknown_fields import settle_unknown_fields

router = APIRouter(tags=["batches"])

MAX_PAGE, DEFAULT_PAGE = 100, 20
# The statuses whose times a reply has, each in a field such as `completed_at`.
DATED = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")

BatchId = Annotated[str, Path(description="The id of the batch.")]


@router.post("/v1/batches", response_model=BatchObject, responses=ERRORS)
async def create_batch(body: BatchRequest, request: Request, services: ServicesOf) -> Response:
    """Starts a batch, which runs the requests in an uploaded file in the background."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    owner = tenant_of(request.scope)
    try:
        file = await services.files.get(body.input_file_id, owner)
    except NotStored as error:
        raise RequestRejected(str(error), param="input_file_id", code=error.code) from None
    if file.purpose != "batch":
        raise RequestRejected(
            f"The file has the purpose {file.purpose}; it must be batch.", param="input_file_id", code="invalid_purpose"
        )
    now = int(services.batches.now())
    record = Record(
        id=f"batch_{uuid.uuid4().hex}",
        owner=owner,
        endpoint=body.endpoint,
        input_file=file.id,
        window=body.completion_window,
        created=now,
        expires=now + window_seconds(body.completion_window),
        metadata=body.metadata,
        output_lifetime=body.output_expires_after and body.output_expires_after.seconds,
    )
    return json_response(batch_object(await services.batches.add(record)))


@router.get("/v1/batches", response_model=BatchList, responses=ERRORS)
async def list_batches(
    request: Request,
    services: ServicesOf,
    after: Annotated[str | None, Query(description="The id of the batch after which the page begins.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="The number of batches in the page.")] = DEFAULT_PAGE,
) -> Response:
    """Lists the batches of the API key's owner, the newest first."""
    batches = await services.batches.page(tenant_of(request.scope), after=after, limit=limit + 1)
    page = [batch_object(batch) for batch in batches[:limit]]
    ends = (page[0].id, page[-1].id) if page else ("", "")
    return json_response(BatchList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(batches) > limit))


@router.get("/v1/batches/{batch_id}", response_model=BatchObject, responses=ERRORS)
async def retrieve_batch(batch_id: BatchId, request: Request, services: ServicesOf) -> Response:
    return json_response(batch_object(await services.batches.get(batch_id, tenant_of(request.scope))))


@router.post("/v1/batches/{batch_id}/cancel", response_model=BatchObject, responses=ERRORS)
async def cancel_batch(batch_id: BatchId, request: Request, services: ServicesOf) -> Response:
    """Cancels a batch. The results of its finished requests are kept."""
    return json_response(batch_object(await services.batches.cancel(batch_id, tenant_of(request.scope))))


def batch_object(batch: Batch) -> BatchObject:
    record, times, tokens = batch.record, batch.record.times, batch.tokens
    reached: dict[str, Any] = {f"{status}_at": times.get(status) for status in DATED}
    return BatchObject(
        id=record.id,
        endpoint=record.endpoint,
        input_file_id=record.input_file,
        completion_window=record.window,
        status=record.status,
        errors=BatchErrors(data=[BatchError(**error) for error in record.errors]) if record.errors else None,
        output_file_id=None if record.is_open else record.output_file,
        error_file_id=None if record.is_open else record.error_file,
        created_at=record.created,
        expires_at=record.expires,
        **reached,
        request_counts=BatchRequestCounts(total=record.total, completed=batch.completed, failed=batch.failed),
        usage=BatchUsage(
            input_tokens=tokens.input,
            input_tokens_details=BatchInputDetails(cached_tokens=tokens.cached),
            output_tokens=tokens.output,
            output_tokens_details=BatchOutputDetails(reasoning_tokens=tokens.reasoning),
            total_tokens=tokens.input + tokens.output,
        ),
        metadata=record.metadata,
    )
