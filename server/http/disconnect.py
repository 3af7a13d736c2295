"""Finds out that a client has closed its connection."""

from __future__ import annotations

from starlette.types import Receive


async def disconnected(receive: Receive) -> None:
    """Waits until the client of a request has disconnected. What the client sends before is ignored."""
    while (await receive())["type"] != "http.disconnect":
        pass
