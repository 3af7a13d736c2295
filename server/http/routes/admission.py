"""What a route does before it needs the engine."""

from __future__ import annotations

from fastapi import Request

from jamba_server.server.http.services import Services
from jamba_server.server.http.sse import until_disconnect


async def wait_for_start(request: Request, services: Services, *, num_choices: int = 1) -> None:
    """Waits while the engine loads for the first time, within the server's bounds. `request` has been read to its end.

    Raises EngineLoading, Overloaded, and ClientDisconnect when the client goes away meanwhile.
    """
    if services.engine.health.loading is not None:
        await until_disconnect(request.receive, services.startup.wait(num_choices))
