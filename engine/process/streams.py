"""The classes for requests that were submitted to the engine and have not ended, and for the streams that carry their
updates (new tokens) to the HTTP handlers.

The backlog of a stream consists of the updates that the engine has sent and the reader of the stream has not taken yet.
If the reader is slow, the requests of the stream are paused before the backlog fills the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from jamba_server.engine.errors import EngineError
from jamba_server.engine.types import Request, TokenLogprob, TokenUpdate

# The requests of a stream are paused if an update arrives while the updates that wait for the reader have more bytes
# than this number.
BACKLOG_BYTES = 256 * 1024
# The limit BACKLOG_BYTES is raised by this number of bytes for each request of the stream, because each step of the
# engine brings one update for each request.
BACKLOG_BYTES_PER_REQUEST = 16 * 1024
# Paused requests are run again when the waiting updates have fewer bytes than 1/RESUME_PART of the limit.
RESUME_PART = 4

# The following numbers are estimated sizes of objects in memory, in bytes.
_UPDATE_BYTES = 400
_NUMBER_BYTES = 40  # this is the size of an integer or a float in a list
_LOGPROB_BYTES = 150
_ALTERNATIVE_BYTES = 120  # this is the size of one entry in a list of the most likely tokens


class LiveRequest:
    """A request that was submitted and has not ended.

    `sent` says whether the request was sent to the present engine process. `running` says whether that process has
    begun to compute the request, and `queued` whether the request waits in the queue of that process. `num_updates`
    counts the updates from the present engine process. `started` says whether any engine process has ever begun to
    compute the request. `deaths` counts successive deaths of engine processes that this request may have caused, and
    `kills` counts successive kills of engine processes by other processes; the module `suspects` updates both numbers.
    `interrupted` says that an engine process died while it had the request, and that the request has not been sent to
    another engine process since then.
    """

    def __init__(self, request: Request, stream: Stream) -> None:
        self.request, self.stream = request, stream
        self.sent = self.running = self.queued = self.started = self.paused = self.interrupted = False
        self.num_updates = self.deaths = self.kills = 0
        self.generated: list[int] = []
        self._num_prompt_logprobs = self._num_pauses = 0
        self._announced = False

    @property
    def engine_id(self) -> str:
        """The id of the request in the engine. A request that was paused gets another id when it goes on, so that
        updates from before the pause are recognised and dropped."""
        return f"{self.request.id}~{self._num_pauses}" if self._num_pauses else self.request.id

    @property
    def is_handled(self) -> bool:
        """Returns whether the request could be the cause if the present engine process dies now. A request that only
        waits in the engine's queue cannot be the cause."""
        return self.sent and not self.queued

    def for_engine(self) -> Request:
        """Returns the request in the form that is sent to an engine process. The result includes the reply tokens that
        the stream has received already. So the engine continues the reply after these tokens."""
        return msgspec.structs.replace(
            self.request,
            id=self.engine_id,
            parent=self.request.parent or self.request.id,
            generated=self.generated,
            num_prompt_logprobs=self._num_prompt_logprobs,
        )

    def take(self, update: TokenUpdate) -> TokenUpdate:
        """Records the tokens of an update and returns the update for the stream.

        The number of cached tokens and the queue time are delivered only once per request. If an engine process reports
        them again, they are removed from the update.
        """
        self.num_updates += 1
        self.generated += update.token_ids
        self._num_prompt_logprobs += len(update.prompt_logprobs)
        if self._announced:
            return msgspec.structs.replace(update, request_id=self.request.id, num_cached=None, queue_seconds=None)
        self._announced = True
        return msgspec.structs.replace(update, request_id=self.request.id)

    def pause(self) -> None:
        """Records that the request is aborted in the engine, and that it must not be sent to the engine again until its
        stream is resumed."""
        self.leave_engine()
        self.paused = True
        self._num_pauses += 1

    def leave_engine(self) -> None:
        """Records that the request is no longer in any engine process."""
        self.sent = self.running = self.queued = False
        self.num_updates = 0


class Stream:
    """The stream of updates (new tokens) that one call of `EngineClient.generate` returns. It implements the interface
    `UpdateStream`.

    The function `forget` is called with the ids of requests whose updates nobody will read. The function `resume` is
    called when the reader of a paused stream has taken most of the updates that waited.
    """

    def __init__(
        self,
        request_ids: list[str],
        *,
        forget: Callable[[list[str]], None],
        resume: Callable[[Stream], None],
    ) -> None:
        self.open = set(request_ids)
        self.paused = False
        self.backlog = 0  # this is the estimated size of the updates in the queue, in bytes
        self.limit = BACKLOG_BYTES + BACKLOG_BYTES_PER_REQUEST * len(request_ids)
        self._forget, self._resume = forget, resume
        self._queue: asyncio.Queue[TokenUpdate | EngineError] = asyncio.Queue()

    @property
    def is_full(self) -> bool:
        return self.backlog > self.limit

    def put(self, item: TokenUpdate | EngineError) -> None:
        """Adds an update to the stream, or an error that ends the stream."""
        if isinstance(item, TokenUpdate):
            self.backlog += size_of(item)
        self._queue.put_nowait(item)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> TokenUpdate:
        while self.open or not self._queue.empty():
            item = await self._queue.get()
            if isinstance(item, EngineError):
                raise item
            self.backlog -= size_of(item)
            if self.paused and self.backlog * RESUME_PART <= self.limit:
                self._resume(self)
            if item.request_id in self.open:
                if item.finish_reason:
                    self.open.discard(item.request_id)
                return item
        raise StopAsyncIteration

    def abort(self, request_id: str) -> None:
        if request_id in self.open:
            self.open.discard(request_id)
            self._forget([request_id])

    def close(self) -> None:
        request_ids, self.open = sorted(self.open), set()
        self._forget(request_ids)


def size_of(update: TokenUpdate) -> int:
    """Returns an estimate of the memory that an update occupies, in bytes."""
    return (
        _UPDATE_BYTES
        + _NUMBER_BYTES * len(update.token_ids)
        + len(update.vector or b"")
        + _size_of_logprobs(update.logprobs)
        + _size_of_logprobs(update.prompt_logprobs)
    )


def _size_of_logprobs(entries: list[TokenLogprob] | list[TokenLogprob | None]) -> int:
    """Returns an estimate of the size of log-probabilities in memory, in bytes. The estimate assumes that all entries
    have as many alternative tokens as the last entry."""
    last = entries[-1] if entries else None
    return len(entries) * (_LOGPROB_BYTES + _ALTERNATIVE_BYTES * len(last.top if last else ()))
