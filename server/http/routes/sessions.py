"""The routes of /v1/sessions: conversations of /v1/responses under a name."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.chat_task import plan_chat
from jamba_server.server.http.errors import SessionNotFound, tenant_of
from jamba_server.server.http.routes.admission import prepared, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.base import CacheOptions, GenerationBody
from jamba_server.server.http.schemas.responses.items import new_id
from jamba_server.server.http.schemas.sessions import (
    DeletedSession,
    ForkRequest,
    PinnedSession,
    PinRequest,
    RewindRequest,
    SessionList,
    SessionObject,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.session_task import conversation
from jamba_server.server.http.store.sessions import Session
from jamba_server.server.http.unknown_fields import settle_unknown_fields

router = APIRouter(prefix="/v1/sessions", tags=["responses"])


@router.get("", response_model=SessionList, responses=ERRORS)
async def list_sessions(request: Request, services: ServicesOf) -> Response:
    """Lists the sessions of the API key, the most recently used first."""
    owner = tenant_of(request.scope)
    sessions = await services.responses.sessions(lambda table: table.list(owner))
    lengths = await services.responses.lengths([session.response_id for session in sessions], owner)
    return json_response(SessionList(data=[_object(session, lengths[session.response_id]) for session in sessions]))


@router.get("/{name}", response_model=SessionObject, responses=ERRORS)
async def get_session(name: str, request: Request, services: ServicesOf) -> Response:
    owner = tenant_of(request.scope)
    return json_response(await _described(await _find(name, owner, services), owner, services))


@router.delete("/{name}", response_model=DeletedSession, responses=ERRORS)
async def delete_session(name: str, request: Request, services: ServicesOf) -> Response:
    """Deletes a session and ends its pin. Its responses stay stored."""
    owner = tenant_of(request.scope)
    session = await services.responses.sessions(lambda table: table.delete(name, owner))
    if session is None:
        raise _not_found(name)
    if session.pin is not None:
        services.engine.unpin(session.pin)
    return json_response(DeletedSession(id=name))


@router.post("/{name}/fork", response_model=SessionObject, responses=ERRORS)
async def fork_session(name: str, body: ForkRequest, request: Request, services: ServicesOf) -> Response:
    """Makes another session that continues the same conversation. Both share what the prefix cache has of it."""
    settle_unknown_fields(body, request, services)
    owner = tenant_of(request.scope)
    session = await _find(name, owner, services)
    if not await services.responses.sessions(lambda table: table.add(body.id, owner, session.response_id, _now())):
        raise RequestRejected(f"id is {body.id!r}, but there is a session of this name.", param="id")
    return json_response(await _described(await _find(body.id, owner, services), owner, services))


@router.post("/{name}/rewind", response_model=SessionObject, responses=ERRORS)
async def rewind_session(name: str, body: RewindRequest, request: Request, services: ServicesOf) -> Response:
    """Leaves out the last responses of a session, so that the next request continues an earlier one."""
    settle_unknown_fields(body, request, services)
    owner = tenant_of(request.scope)
    session = await _find(name, owner, services)
    ids = await services.responses.chain(session.response_id, owner)
    if body.responses > len(ids):
        raise RequestRejected(
            f"responses is {body.responses}, but the session has {len(ids)} stored responses.", param="responses"
        )
    last = ids[-body.responses - 1] if body.responses < len(ids) else None
    if not await services.responses.sessions(lambda table: table.move(name, owner, session.response_id, last)):
        raise RequestRejected("Another request has used the session meanwhile; try again.", param="name")
    return json_response(await _described(await _find(name, owner, services), owner, services))


@router.post("/{name}/pin", response_model=PinnedSession, responses=ERRORS)
async def pin_session(name: str, body: PinRequest, request: Request, services: ServicesOf) -> Response:
    """Protects a session's conversation from eviction. What is not cached is computed first. The pin replaces the
    session's earlier pin."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    owner = tenant_of(request.scope)
    session = await _find(name, owner, services)
    if session.response_id is None:
        raise RequestRejected(f"The session {name!r} has no response that could be pinned.", param="name")
    task = await conversation(
        session.response_id, owner, services, GenerationBody(max_tokens=0, cache=CacheOptions(pin=body.seconds))
    )
    spec = await prepared(request, plan_chat(task, services, id_=new_id("pin"), scope=request.scope))
    generation = services.generation(spec)
    await prepared(request, generation.collect())
    cache, made = generation.cache, spec.requests()[0].id
    is_pinned = cache is not None and bool(cache.pinned_tokens)
    pin, until = (made, _now() + int(body.seconds)) if is_pinned else (None, None)
    try:
        before = await services.responses.sessions(lambda table: table.pin(name, owner, pin, until))
        if before is None:  # it was deleted meanwhile
            raise _not_found(name)
    except BaseException:
        services.engine.unpin(made)
        raise
    if before.pin is not None:  # the pin that is replaced may be that of a request which came meanwhile
        services.engine.unpin(before.pin)
    described = await _described(replace(session, pin=pin, pinned_until=until), owner, services)
    return json_response(PinnedSession(**_fields(described), jamba_cache=cache))


def _fields(session: SessionObject) -> dict[str, Any]:
    return session.model_dump(exclude={"object"})


async def _find(name: str, owner: str, services: Services) -> Session:
    if (session := await services.responses.sessions(lambda table: table.get(name, owner))) is None:
        raise _not_found(name)
    return session


def _not_found(name: str) -> SessionNotFound:
    return SessionNotFound(f"There is no session {name[:64]!r}.")


async def _described(session: Session, owner: str, services: Services) -> SessionObject:
    lengths = await services.responses.lengths([session.response_id], owner)
    return _object(session, lengths[session.response_id])


def _object(session: Session, num_responses: int) -> SessionObject:
    until = session.pinned_until
    return SessionObject(
        id=session.name,
        created_at=session.created_at,
        response_id=session.response_id,
        num_responses=num_responses,
        pinned_until=until if until is not None and until > _now() else None,
    )


def _now() -> int:
    return int(time.time())
