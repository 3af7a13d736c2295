"""An engine that says what a test has written down, when the test wants it."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

from jamba_server.engine.errors import EngineDead, EngineError, EngineLoading
from jamba_server.engine.process.client import Health, SupervisionStats
from jamba_server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Progress,
    Request,
    StoredSegment,
    TokenLogprob,
    TokenUpdate,
)

EOS = 2
VOCAB_SIZE = 2048
MAX_MODEL_LEN = 256
HIDDEN_SIZE = 8
QUEUE_SECONDS = 0.25
NUM_CACHED = 3

INFO = EngineInfo(
    architecture="JambaForCausalLM",
    num_parameters=1,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=(EOS,),
    device="cpu",
    dtype="float32",
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_num_mixed_tokens=64,
    block_size=16,
    num_kv_blocks=10,
    num_state_slots=8,
    num_saved_states=4,
    weight_bytes=1,
    kv_bytes=1,
    state_bytes=1,
    kernels={},
    load_seconds=0.0,
    hidden_size=HIDDEN_SIZE,
)

Event = TokenUpdate | Exception
Script = Callable[[Request], Iterable[Event]]


def score(token_id: int, top: int) -> TokenLogprob:
    """Returns a log-probability that depends on the token alone. The `top` most likely tokens have the ids from 1800
    on."""
    return TokenLogprob(token_id, -(1 + token_id % 7) / 4, tuple((1800 + i, -(1 + i) / 8) for i in range(top)))


def updates_of(request: Request, token_ids: list[int], finish: FinishReason, stop_id: int | None) -> Iterator[Event]:
    """Yields the log-probabilities of the prompt, three in an update, and then one update for each token."""
    params = request.params
    scores = [
        None if i == 0 else score(t, params.prompt_logprobs or 0)
        for i, t in enumerate(request.prompt)
        if params.prompt_logprobs is not None
    ]
    first = True
    for start in range(0, len(scores), 3):
        last = not token_ids and start + 3 >= len(scores)
        yield TokenUpdate(
            request_id=request.id,
            prompt_logprobs=scores[start : start + 3],
            finish_reason=finish if last else None,
            num_cached=NUM_CACHED if first else None,
            queue_seconds=QUEUE_SECONDS if first else None,
        )
        first = False
    for number, token_id in enumerate(token_ids, start=1):
        last = number == len(token_ids)
        yield TokenUpdate(
            request_id=request.id,
            token_ids=[token_id],
            logprobs=[] if params.logprobs is None else [score(token_id, params.logprobs)],
            finish_reason=finish if last else None,
            stop_token_id=stop_id if last else None,
            num_cached=NUM_CACHED if first else None,
            queue_seconds=QUEUE_SECONDS if first else None,
        )
        first = False
    if first:
        yield TokenUpdate(request_id=request.id, finish_reason=finish, num_cached=NUM_CACHED, queue_seconds=0.0)


def says(*replies: list[int]) -> Script:
    """Returns the script of an engine that generates reply i, and then EOS, for choice i. Choices beyond the last reply
    get the last reply. A reply with more than max_tokens tokens is cut."""

    def script(request: Request) -> Iterator[Event]:
        token_ids = [*replies[min(request.index, len(replies) - 1)], EOS]
        if len(token_ids) > request.params.max_tokens:
            yield from updates_of(request, token_ids[: request.params.max_tokens], "length", None)
        else:
            yield from updates_of(request, token_ids, "stop", EOS)

    return script


def vectors(request: Request) -> Iterator[Event]:
    """Yields a vector whose numbers depend on the prompt: as many as a hidden state has, one for a classifier, or one
    for each target."""
    number = (sum(request.prompt) % 97 + 1) / 13
    size = {"embed": HIDDEN_SIZE, "classify": 1}.get(request.kind, sum(map(len, request.targets)))
    numbers = array("f", [-number / (i + 1) for i in range(size)])
    yield TokenUpdate(request_id=request.id, vector=numbers.tobytes(), finish_reason="length", num_cached=1)


class FakeStream:
    """The updates of several requests, which take turns: one update of each."""

    def __init__(self, engine: FakeEngine, requests: list[Request]) -> None:
        self._engine = engine
        scripts = {request.id: engine.script if request.kind == "generate" else vectors for request in requests}
        self.open = {request.id: iter(scripts[request.id](request)) for request in requests}
        self._turns = deque(self.open)

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenUpdate:
        while self._turns:
            request_id = self._turns.popleft()
            if request_id not in self.open:
                continue
            await self._engine.wait_for_turn()
            event = next(self.open[request_id])
            if isinstance(event, Exception):
                raise event
            if event.finish_reason:
                del self.open[request_id]
            else:
                self._turns.append(request_id)
            return event
        raise StopAsyncIteration

    def abort(self, request_id: str) -> None:
        if self.open.pop(request_id, None) is not None:
            self._engine.aborted.append(request_id)


class FakeEngine:
    """Implements `process.client.Engine`. It stalls after `limit` updates until `resume` is set."""

    def __init__(self, script: Script, *, limit: float = math.inf) -> None:
        self.script = script
        self.limit = limit
        self.refusal: EngineError | None = None
        self.health = Health(alive=True, ready=True)
        self.stats = EngineStats()
        self.supervision = SupervisionStats()
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.unpinned: list[str] = []
        self.arrivals: list[StoredSegment] = []
        self.num_updates = 0
        self.stalled = asyncio.Event()
        self.resume = asyncio.Event()
        self.left = asyncio.Event()  # set when a block of `generate` has ended
        self.num_waiting = 0  # the number of calls of `first_start` that have not returned
        self.waits = asyncio.Event()  # set when `first_start` has been called
        self._started = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        if not self.health.alive:
            raise EngineDead(self.health.reason)
        if self.health.loading:
            raise EngineLoading(self.health.reason)
        return INFO

    def load(self, phase: str, fraction: float) -> None:
        """Makes the engine load for the first time, until `start` is called."""
        self.health = Health(alive=True, ready=False, reason="the engine is loading", loading=Progress(phase, fraction))

    def start(self, health: Health | None = None) -> None:
        """Ends the first start. The engine is ready then, or has the given `health`."""
        self.health = health or Health(alive=True, ready=True)
        self._started.set()

    async def first_start(self) -> None:
        self.num_waiting += 1
        self.waits.set()
        try:
            await self._started.wait()
        finally:
            self.num_waiting -= 1

    async def wait_for_turn(self) -> None:
        if self.num_updates >= self.limit:
            self.stalled.set()
            await self.resume.wait()
        self.num_updates += 1
        await asyncio.sleep(0)

    def unpin(self, request_id: str) -> None:
        self.unpinned.append(request_id)

    def arrived(self, segments: list[StoredSegment]) -> None:
        self.arrivals += segments

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[FakeStream]:
        if self.refusal is not None:
            raise self.refusal
        self.requests += requests
        stream = FakeStream(self, requests)
        try:
            yield stream
        finally:
            self.aborted += stream.open
            stream.open = {}
            self.left.set()
