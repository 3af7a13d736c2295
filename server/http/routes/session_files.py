"""The routes of /v1/sessions that move a session to another server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response, StreamingResponse

from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.format import Header
from jamba_server.engine.disk_tier.transfer import Arrivals, find_chain
from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.cache_use import cache_salt
from jamba_server.server.http.chat_task import plan_chat
from jamba_server.server.http.errors import SessionNotFound, tenant_of
from jamba_server.server.http.limits.bodies import BodyShare
from jamba_server.server.http.routes.admission import prepared, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.responses.items import new_id
from jamba_server.server.http.schemas.sessions import (
    SESSION_BODY,
    SESSION_FILE,
    ImportedSession,
    LeftOut,
    SessionName,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.session_files.disk import (
    contents_of,
    found_segments,
    open_folder,
    until_found,
    until_written,
)
from jamba_server.server.http.session_files.format import REASONS, Contents, bad_file, packed
from jamba_server.server.http.session_files.intake import Intake
from jamba_server.server.http.session_files.turns import stored_turns, turn_of
from jamba_server.server.http.session_task import conversation
from jamba_server.server.http.store.sessions import Session
from jamba_server.server.http.unknown_fields import warn

router = APIRouter(prefix="/v1/sessions", tags=["responses"])

CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {SESSION_FILE: {"schema": {"type": "string", "format": "binary"}}}}
}
_NAME: TypeAdapter[str] = TypeAdapter(SessionName)


@router.get("/{name}/export", response_class=Response, responses=CONTENT | ERRORS)
async def export_session(
    name: str,
    request: Request,
    services: ServicesOf,
    segments: Annotated[
        bool, Query(description="Add what the disk tier of the prefix cache has of the conversation.")
    ] = True,
) -> Response:
    """Returns a file with the stored responses of a session, from which another server can continue it."""
    owner, limit = tenant_of(request.scope), services.config.max_body_bytes
    session = await services.responses.sessions(lambda table: table.get(name, owner))
    if session is None:
        raise SessionNotFound(f"There is no session {name[:64]!r}.")
    turns = await services.responses.turns(session.response_id, owner, max_bytes=limit)
    folder, headers, left_out = None, list[Header](), None
    if not segments:
        left_out = "not_wanted"
    elif session.response_id is not None:
        folder, headers, left_out = await _cached(session, owner, request, services)
    contents = Contents(
        session=name,
        created_at=session.created_at,
        turns=[turn_of(turn) for turn in turns],
        fingerprint="" if folder is None else folder.fingerprint,
        segments=[header.num_bytes for header in headers],
        segments_left_out=left_out,
    )
    head = packed(contents, limit=limit)
    _warn(left_out, request)
    size = len(head) + sum(contents.segments)
    return StreamingResponse(
        _file(head, folder, headers),
        media_type=SESSION_FILE,
        headers={"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{name}.jamba-session"'},
    )


@router.post("/import", response_model=ImportedSession, responses=ERRORS, openapi_extra=SESSION_BODY)
async def import_session(
    request: Request,
    services: ServicesOf,
    id: Annotated[SessionName | None, Query(description="The name of the session. Default: that in the file.")] = None,
) -> Response:
    """Makes a session from a file of `GET /v1/sessions/{name}/export`. It belongs to the API key of the request."""
    services.lifecycle.admit()
    if not services.responses.enabled:
        raise RequestRejected("This server stores no responses (--max-stored-responses).", param="file")
    intake = Intake(request, patience=services.config.body_timeout)
    with BodyShare(services.edge.bodies) as share:
        contents = await intake.header(share, limit=services.config.max_body_bytes)
        name = _name(contents.session) if id is None else id
        return json_response(await _imported(intake, contents, name, request, services))


async def _imported(
    intake: Intake, contents: Contents, name: str, request: Request, services: Services
) -> ImportedSession:
    """Makes the session `name` from a file whose header has been read."""
    owner = tenant_of(request.scope)
    if await services.responses.sessions(lambda table: table.get(name, owner)) is not None:
        raise _taken(name)
    turns = await services.in_thread(lambda: stored_turns(contents.turns, owner=owner, session=name))
    before = found_segments(services.engine)
    number, left_out = await _take_segments(intake, contents, owner, services)
    await intake.end()
    now = int(time.time())
    if not await services.responses.put_session(name, owner, turns, now):
        raise _taken(name)
    if number:
        await until_found(services.engine, before + number)
    _warn(left_out, request)
    return ImportedSession(
        id=name,
        created_at=now,
        response_id=turns[-1][0].id if turns else None,
        num_responses=len(turns),
        pinned_until=None,
        num_segments=0 if left_out else len(contents.segments),
        segments_left_out=left_out,
    )


async def _cached(
    session: Session, owner: str, request: Request, services: Services
) -> tuple[SegmentFolder | None, list[Header], LeftOut | None]:
    """Returns the folder of the disk tier, and the segments that it has of a session's conversation, or why there are
    none."""
    await wait_for_start(request, services)
    if (folder := await _folder(services)) is None:
        return None, [], "no_disk_tier"
    assert session.response_id is not None, "a session without a response has no conversation"
    task = await conversation(session.response_id, owner, services, GenerationBody(max_tokens=0))
    try:
        spec = await prepared(request, plan_chat(task, services, id_=new_id("export"), scope=request.scope))
    except RequestRejected:  # the conversation does not fit into the context as a whole
        return folder, [], "not_cached"
    await until_written(services.engine)
    try:
        headers = await anyio.to_thread.run_sync(find_chain, folder, spec.prompts[0].token_ids, spec.cache_salt)
    except OSError:
        headers = []
    return folder, headers, None if headers else "not_cached"


async def _folder(services: Services) -> SegmentFolder | None:
    try:
        return await anyio.to_thread.run_sync(open_folder, services.config, services.engine)
    except OSError:
        return None


async def _take_segments(
    intake: Intake, contents: Contents, owner: str, services: Services
) -> tuple[int, LeftOut | None]:
    """Reads the segments of a file. Returns how many of them are new, and why they were left out."""
    if not contents.segments:
        return 0, contents.segments_left_out
    left_out: LeftOut | None = None
    folder = None
    if owner and services.config.share_prefix_cache:
        left_out = "shared_cache"
    elif services.engine.health.loading is not None or (folder := await _folder(services)) is None:
        left_out = "no_disk_tier"
    elif folder.fingerprint != contents.fingerprint:
        left_out = "other_model"
    if left_out is not None or folder is None:
        await intake.skip(sum(contents.segments))
        return 0, left_out
    salt, longest = cache_salt(None, owner, services.config), services.engine.info.max_model_len
    arrivals = Arrivals(folder, salt)
    number = await intake.segments(contents.segments, arrivals, services.segment_turns, max_tokens=longest)
    return (0, "not_written") if number is None else (number, None)


async def _file(head: bytes, folder: SegmentFolder | None, headers: Sequence[Header]) -> AsyncGenerator[bytes]:
    yield head
    if folder is not None:
        async with aclosing(contents_of(folder, headers)) as chunks:
            async for chunk in chunks:
                yield chunk


def _warn(left_out: LeftOut | None, request: Request) -> None:
    if left_out is not None and left_out != "not_wanted":
        warn(f"the prefix cache's segments are left out: {REASONS[left_out]}", request.scope)


def _name(name: str) -> str:
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        raise bad_file(f"its name {name[:64]!r} is not one of a session") from None


def _taken(name: str) -> RequestRejected:
    return RequestRejected(f"There is a session {name!r} already; choose another name with `id`.", param="id")
