"""A client below HTTP: it sees every event of a reply as it is sent, and may go away at any moment."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

from fastapi import FastAPI
from starlette.types import Message

TIMEOUT_SECONDS = 10.0  # the time limit of a wait; only a test that fails waits that long


class Exchange:
    """One request to `app`, running in a task while the `async with` lasts."""

    def __init__(
        self, app: FastAPI, path: str, body: dict[str, Any], headers: dict[str, str] | None = None, method: str = "POST"
    ) -> None:
        self._app = app
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._to_read: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        sent_headers = {"content-type": "application/json", **(headers or {})}
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "root_path": "",
            "query_string": path.partition("?")[2].encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent_headers.items()],
        }

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._gone.set()
        await asyncio.wait_for(self._task, TIMEOUT_SECONDS)

    async def _receive(self) -> Message:
        if self._to_read:
            return self._to_read.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._sent.put(message)

    async def next_message(self) -> Message:
        return await asyncio.wait_for(self._sent.get(), TIMEOUT_SECONDS)

    async def status(self) -> int:
        message = await self.next_message()
        assert message["type"] == "http.response.start"
        return message["status"]

    async def next_bytes(self) -> bytes:
        message = await self.next_message()
        assert message["type"] == "http.response.body"
        return message["body"]

    @property
    def silent(self) -> bool:
        return self._sent.empty()

    @property
    def num_waiting(self) -> int:
        return self._sent.qsize()

    def disconnect(self) -> None:
        self._gone.set()
