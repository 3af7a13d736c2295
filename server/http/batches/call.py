"""Calls an endpoint of the application with the body of a line, without HTTP."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.types import Message, Scope

from jamba_server.server.http.errors import OnProgress, describe

CLIENT = "batches"  # the name of the client, where clients take turns and there are no API keys


@dataclass(frozen=True, slots=True)
class Outcome:
    """The reply to a line. `body` is JSON."""

    status: int
    request_id: str
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


async def call(
    app: FastAPI,
    path: str,
    body: bytes,
    *,
    owner: str,
    background: bool,
    on_progress: OnProgress = lambda stage: None,
) -> Outcome:
    """Calls an endpoint for an owner of API keys. With `background`, the engine runs the request when it has nothing
    else to do. The function `on_progress` is told of the progress of the request. If the caller is cancelled, so is the
    request."""
    request_id = uuid.uuid4().hex
    parts: list[bytes] = []
    status = 0
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # the client never disconnects
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    state: dict[str, object] = {
        "request_id": request_id,
        "tenant": owner,
        "arrived": asyncio.get_running_loop().time(),
        "on_progress": on_progress,
    }
    if background:
        state["background"] = True
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": (CLIENT, 0),
        "server": None,
        "state": state,
    }
    try:
        await app(scope, receive, send)
    except Exception as exc:  # noqa: BLE001 (`describe` logs it, and the reply is that of any request with it)
        problem = describe(exc)
        return Outcome(problem.status, request_id, problem.body_for(scope))
    return Outcome(status, request_id, b"".join(parts))
