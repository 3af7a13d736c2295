"""The routes of /v1/files: upload, list, retrieve, content and delete."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, BinaryIO, Literal

import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response, StreamingResponse

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.errors import tenant_of
from jamba_server.server.http.files.table import StoredFile
from jamba_server.server.http.files.upload import Form, read_upload
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.files import (
    MAX_LIFETIME_SECONDS,
    MIN_LIFETIME_SECONDS,
    UPLOAD_BODY,
    UPLOAD_FORM,
    DeletedFile,
    FileList,
    FileObject,
)
from jamba_server.server.http.services import ServicesOf

router = APIRouter(tags=["batches"])

MAX_PAGE = 10_000  # maximum number of files in one page, as in OpenAI's API
CHUNK_BYTES = 256 * 1024
JSON_LINES = "application/jsonl"
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = frozenset(UPLOAD_FORM["properties"])
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {JSON_LINES: {"schema": {"type": "string", "format": "binary"}}}}
}

FileId = Annotated[str, Path(description="The id of the file.")]


@router.post("/v1/files", response_model=FileObject, responses=ERRORS, openapi_extra=UPLOAD_BODY)
async def upload_file(request: Request, services: ServicesOf) -> Response:
    """Stores a file with requests for /v1/batches."""
    services.lifecycle.admit()
    store = services.files
    with store.arriving() as arriving:
        form = await read_upload(request, arriving, FIELDS, patience=services.config.body_timeout)
        lifetime = _check(form)
        if form.filename is None or not arriving.size:
            raise RequestRejected("file is missing or empty.", param="file")
        file = await store.keep(arriving, tenant_of(request.scope), filename=form.filename, lifetime=lifetime)
    return json_response(_object(file))


@router.get("/v1/files", response_model=FileList, responses=ERRORS)
async def list_files(
    request: Request,
    services: ServicesOf,
    after: Annotated[str | None, Query(description="The id of the file after which the page begins.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="The number of files in the page.")] = MAX_PAGE,
    order: Annotated[
        Literal["asc", "desc"], Query(description="Whether the oldest or the newest file comes first.")
    ] = "desc",
    purpose: Annotated[str | None, Query(description="List only files with this purpose.")] = None,
) -> Response:
    """Lists the files of the API key's owner: uploads, and the results of batches."""
    files = await services.files.page(
        tenant_of(request.scope), purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
    )
    page = [_object(file) for file in files[:limit]]
    ends = (page[0].id, page[-1].id) if page else ("", "")
    return json_response(FileList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(files) > limit))


@router.get("/v1/files/{file_id}", response_model=FileObject, responses=ERRORS)
async def retrieve_file(file_id: FileId, request: Request, services: ServicesOf) -> Response:
    return json_response(_object(await services.files.get(file_id, tenant_of(request.scope))))


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=CONTENT | ERRORS)
async def retrieve_content(file_id: FileId, request: Request, services: ServicesOf) -> Response:
    """Returns the content of a file."""
    file, content = await services.files.open(file_id, tenant_of(request.scope))
    return StreamingResponse(_chunks(content), media_type=JSON_LINES, headers={"Content-Length": str(file.size)})


@router.delete("/v1/files/{file_id}", response_model=DeletedFile, responses=ERRORS)
async def delete_file(file_id: FileId, request: Request, services: ServicesOf) -> Response:
    """Deletes a file. The input of a batch that has not ended cannot be deleted."""
    owner = tenant_of(request.scope)
    await services.files.get(file_id, owner)
    if (batch := await services.batches.reader_of(file_id)) is not None:
        raise RequestRejected(
            f"The batch {batch} reads this file. Cancel the batch, or wait until it has ended.", param="file_id"
        )
    await services.files.delete(file_id, owner)
    return json_response(DeletedFile(id=file_id))


async def _chunks(content: BinaryIO) -> AsyncGenerator[bytes]:
    with content:
        while chunk := await anyio.to_thread.run_sync(content.read, CHUNK_BYTES):
            yield chunk


def _object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.size,
        created_at=file.created,
        expires_at=file.expires,
        filename=file.filename,
        purpose=file.purpose,
    )


def _check(form: Form) -> int | None:
    """Checks the fields of an upload. Returns the seconds after which the file is deleted, or None for the default."""
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        raise RequestRejected(
            f"purpose is {purpose[:64]!r}; this server keeps only files with the purpose batch."
            if purpose is not None
            else "purpose is missing; it must be batch.",
            param="purpose",
        )
    anchor, seconds = form.fields.get(ANCHOR), form.fields.get(SECONDS)
    if anchor is None and seconds is None:
        return None
    for name, value in ((ANCHOR, anchor), (SECONDS, seconds)):
        if value is None:
            raise RequestRejected(f"{name} is missing; expires_after needs an anchor and seconds.", param=name)
    if anchor != "created_at":
        raise RequestRejected(f"{ANCHOR} is {anchor!r}; it must be created_at.", param=ANCHOR)
    assert seconds is not None, "checked above"
    if not seconds.isascii() or not seconds.isdecimal():
        raise RequestRejected(f"{SECONDS} is {seconds!r}; it must be a number of seconds.", param=SECONDS)
    if not MIN_LIFETIME_SECONDS <= int(seconds) <= MAX_LIFETIME_SECONDS:
        raise RequestRejected(
            f"{SECONDS} is {seconds}; it must be from {MIN_LIFETIME_SECONDS} to {MAX_LIFETIME_SECONDS}.", param=SECONDS
        )
    return int(seconds)
