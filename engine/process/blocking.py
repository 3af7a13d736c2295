"""An engine in processes of its own, for callers that have no event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Generator
from queue import SimpleQueue
from typing import Any, TypeVar

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import EngineError
from jamba_server.engine.process.client import EngineClient, UpdateStream
from jamba_server.engine.types import EngineInfo, Request, TokenUpdate

T = TypeVar("T")


class BlockingEngine:
    """Runs an `EngineClient` and its event loop in a thread. The methods are for one thread at a time. The engine ends
    with `close`, with the last reference to this object, or with this process."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the engine and waits until it is ready. Raises ConfigError if it cannot start."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), daemon=True, name="engine client")
        self._thread.start()
        self._stream: UpdateStream | None = None
        self._open: set[str] = set()  # the ids of the requests that have not ended
        self._client = self._wait(_make(config))
        self._finalizer = weakref.finalize(self, _end, self._loop, self._client)
        try:
            self._wait(self._client.start())
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    def run(self, requests: list[Request]) -> Generator[TokenUpdate]:
        """Yields the updates of the requests until all have ended. If the generator is closed before that, the requests
        are aborted. Raises EngineError if the engine fails."""
        updates: SimpleQueue[TokenUpdate | BaseException | None] = SimpleQueue()
        self._open = {request.id for request in requests}
        pump = asyncio.run_coroutine_threadsafe(self._pump(requests, updates), self._loop)
        try:
            while self._open and (item := updates.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if item.finish_reason:
                    self._open.discard(item.request_id)
                yield item
        finally:
            pump.cancel()

    def abort(self, request_id: str) -> None:
        """Aborts one of the requests that `run` runs. Updates that have arrived already may still follow."""
        self._open.discard(request_id)
        if self._stream is not None:
            self._loop.call_soon_threadsafe(self._stream.abort, request_id)

    def close(self) -> None:
        """Ends the engine. A second call does nothing."""
        if self._finalizer.detach() is None:
            return
        _end(self._loop, self._client)
        self._thread.join()

    async def _pump(self, requests: list[Request], updates: SimpleQueue[TokenUpdate | BaseException | None]) -> None:
        """Moves the updates of the requests into a queue, and then None."""
        try:
            async with self._client.generate(requests) as self._stream:
                async for update in self._stream:
                    updates.put(update)
        except EngineError as error:
            updates.put(error)
        finally:
            self._stream = None
            updates.put(None)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the thread and returns its result. After an interrupt, the coroutine is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _make(config: EngineConfig) -> EngineClient:
    return EngineClient(config)


def _end(loop: asyncio.AbstractEventLoop, client: EngineClient) -> None:
    """Makes the thread close the client and then end. Does not wait for that."""

    async def close() -> None:
        try:
            await client.close()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
