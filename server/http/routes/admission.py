"""What routes do before they use the engine: the function `wait_for_start` waits until the engine has loaded, and the
function `prepared` runs the work that turns a request into the data for the engine."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from jamba_server.engine.types import RequestKind
from jamba_server.engine.validation import validate_kind
from jamba_server.server.http.deadlines import enforced, time_limit_of
from jamba_server.server.http.services import Services
from jamba_server.server.http.sse import until_disconnect

T = TypeVar("T")


def require(services: Services, kind: RequestKind) -> None:
    """Raises ModelCannot if the served model cannot answer requests of this kind. The engine must have loaded."""
    validate_kind(kind, services.engine.info)


async def wait_for_start(request: Request, services: Services, *, num_choices: int = 1) -> None:
    """Waits until the engine has loaded the model, if it loads for the first time. The request's body must already have
    been read.

    Raises EngineLoading if the wait exceeds --startup-wait, DeadlineExceeded if it exceeds the request's time limit,
    Overloaded if too many choices wait already, and ClientDisconnect if the client disconnects.
    """
    if services.engine.health.loading is not None:
        async with enforced(time_limit_of(request.scope)):
            await until_disconnect(request.receive, services.startup.wait(num_choices))


async def prepared(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which may have to wait until the server can render a chat template or check a
    grammar. The request's body must already have been read.

    Cancels `work` and raises ClientDisconnect if the client disconnects, or DeadlineExceeded if the wait exceeds the
    request's time limit. Then the work that other clients wait for does not wait for this request.
    """
    try:
        limit = time_limit_of(request.scope)
    except BaseException:
        work.close()
        raise
    async with enforced(limit):
        return await until_disconnect(request.receive, work)
