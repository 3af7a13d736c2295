"""The function `wait_for_start` waits until the engine has loaded. Routes call this function before they use the
engine."""

from __future__ import annotations

from fastapi import Request

from jamba_server.server.http.deadlines import enforced, time_limit_of
from jamba_server.server.http.services import Services
from jamba_server.server.http.sse import until_disconnect


async def wait_for_start(request: Request, services: Services, *, num_choices: int = 1) -> None:
    """Waits until the engine has loaded the model, if it loads for the first time. The request's body must already have
    been read.

    Raises EngineLoading if the wait exceeds --startup-wait, DeadlineExceeded if it exceeds the request's time limit,
    Overloaded if too many choices wait already, and ClientDisconnect if the client disconnects.
    """
    if services.engine.health.loading is not None:
        async with enforced(time_limit_of(request.scope)):
            await until_disconnect(request.receive, services.startup.wait(num_choices))
