"""The class `Turns` lets clients take turns at work that only a few threads can do at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.types import Scope

from jamba_server.engine.errors import Overloaded
from jamba_server.engine.round_robin import RoundRobin
from jamba_server.server.http.errors import is_background, tenant_of

T = TypeVar("T")

LONGEST_RETRY_SECONDS = 60


class Turns:
    """Runs work of requests in threads, for at most `size` requests at the same time. The clients take turns, so one
    client with many requests does not make the others wait for all of these. A request that has waited `seconds`
    seconds is refused. The errors say that requests wait for `what`."""

    def __init__(self, size: int, *, seconds: float, what: str) -> None:
        self._num_free, self._seconds, self._what = size, seconds, what
        # Each waiting request has a future, which gets a result when it is the request's turn.
        self._waiting: RoundRobin[asyncio.Future[None]] = RoundRobin()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=what)

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Waits for a turn, calls the function `work` in a thread and returns its result. `client` names the client, as
        `client_of` does.

        If the caller is cancelled while it waits, `work` is not called. If it is cancelled later, it does not wait for
        the end of `work`; but the turn lasts until that end. Raises Overloaded if the turn does not come in time.
        """
        await self._turn(client)
        try:
            running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except BaseException:
            self._release()
            raise
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)

    async def _turn(self, client: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.put(client, turn)
        try:
            async with asyncio.timeout(self._seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._release()  # the turn came when the wait was ending for another reason
            else:
                with contextlib.suppress(KeyError, ValueError):
                    self._waiting.remove(client, turn)
            if isinstance(error, TimeoutError):
                raise self._overloaded() from None
            raise

    def _ended(self, running: asyncio.Future[T]) -> None:
        if not running.cancelled():
            running.exception()  # asyncio would otherwise log an exception that no cancelled caller has received
        self._release()

    def _release(self) -> None:
        """Gives the turn that has ended to the next waiting request."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._num_free += 1

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"The request has waited {self._seconds:g} s for {self._what}, and {len(self._waiting)} other requests are "
            "waiting; send the request again.",
            retry_after=min(LONGEST_RETRY_SECONDS, 1 + len(self._waiting)),
        )


def client_of(scope: Scope) -> str:
    """Returns a name for the client that sent a request: the name of its API key, or its address if the server requires
    no key. The lines of batches of an owner count as another client, so that the owner's other requests do not wait for
    them."""
    address, *_ = scope.get("client") or ("",)
    name = tenant_of(scope) or str(address)
    return f"batches of {name}" if is_background(scope) else name
