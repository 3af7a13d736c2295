"""The middleware `QueueGate` refuses requests while the queue is full, before their bodies are read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from jamba_server.engine.errors import Overloaded
from jamba_server.server.http.limits.waiting import WaitingTokens
from jamba_server.server.http.streams.headers import STREAM_PATHS, begins_nothing


class QueueGate:
    """Refuses requests to the generating endpoints while `limit` or more choices wait for their first token. The
    engine's client would refuse one more choice anyway.

    The engine's client checks the length of its queue exactly, but only after the body of the request has been read,
    validated and tokenised. In a flood of requests, this work would delay the requests that have been admitted. If
    `limit` is 0, there is no limit.
    """

    def __init__(self, app: ASGIApp, *, waiting: WaitingTokens, limit: int) -> None:
        self.app, self.waiting, self.limit = app, waiting, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.limit and scope["type"] == "http" and self.waiting.num_choices >= self.limit and _needs_place(scope):
            raise Overloaded(
                f"{self.waiting.num_choices} choices run without a token or wait; the limit, which follows from "
                f"--max-queue-requests and --max-num-seqs, is {self.limit}.",
                retry_after=self.waiting.retry_after,
            )
        await self.app(scope, receive, send)


def _needs_place(scope: Scope) -> bool:
    path: str = scope["path"]
    path = path.removeprefix(scope.get("root_path", ""))
    return scope["method"] == "POST" and path in STREAM_PATHS and not begins_nothing(scope)
