"""Engines whose ranks are threads of this process: the first one takes requests, the others run the same steps."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.process.lockstep import FollowingInbox, LeadingInbox
from jamba_server.engine.process.ranks import StepInputs, checksum
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.start.parallel import Joined
from jamba_server.engine.start.rank_options import num_ranks, stages_of
from jamba_server.engine.types import Request, Submit, TokenUpdate
from tests.engine.parallel.ranks import CPU, TIMEOUT

Queue = SimpleQueue[Submit | StepInputs | None]


@contextmanager
def running(config: EngineConfig) -> Generator[EngineCore]:
    """Context manager: the engine of rank 0, while the threads of the other ranks follow it."""
    size = num_ranks(config)
    if size == 1:
        yield build_engine(config)
        return
    store, failures = HashStore(), list[BaseException]()
    stages = stages_of(config, load_model_config(Path(config.model)))
    cores: list[EngineCore] = []  # a rank that has ended must not close connections of which others still read
    queues: list[Queue] = [SimpleQueue() for _ in range(1, size)]

    def follow(rank: int, queue: Queue) -> None:
        try:
            core = build_engine(config, joined=Joined.meet(config, stages, rank, store, CPU, TIMEOUT))
            cores.append(core)
            core.inbox = inbox = FollowingInbox(core.inbox.compiler)
            results = 0
            while (message := queue.get()) is not None:
                # As between processes, a message is a copy.
                message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Submit | StepInputs)
                if isinstance(message, Submit):
                    inbox.submit(message.requests)
                else:
                    assert message.results == results, "all ranks compute the same tokens"
                    inbox.follow(message)
                    results = checksum(core.step())
        except BaseException as error:
            failures.append(error)
            raise

    threads = [
        threading.Thread(target=follow, args=(rank, queue), daemon=True) for rank, queue in enumerate(queues, start=1)
    ]
    for thread in threads:
        thread.start()
    core = build_engine(config, joined=Joined.meet(config, stages, 0, store, CPU, TIMEOUT))

    def send(message: Submit | StepInputs) -> None:
        for queue in queues:
            queue.put(message)

    core.inbox = LeadingInbox(core.inbox.compiler, send)
    try:
        yield core
    finally:
        for queue in queues:
            queue.put(None)
        for thread in threads:
            thread.join(timeout=60)
    assert not failures


class Reply(msgspec.Struct):
    """The results of a request: tokens, log-probabilities with alternatives, and the finish reason."""

    token_ids: list[int] = msgspec.field(default_factory=list[int])
    logprobs: list[Any] = msgspec.field(default_factory=list[Any])
    prompt_logprobs: list[Any] = msgspec.field(default_factory=list[Any])
    finish_reason: str | None = None
    num_cached: int = 0

    def take(self, update: TokenUpdate) -> None:
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish_reason = update.finish_reason
        self.num_cached = self.num_cached if update.num_cached is None else update.num_cached

    @property
    def content(self) -> tuple[list[int], list[Any], list[Any], str | None]:
        return self.token_ids, self.logprobs, self.prompt_logprobs, self.finish_reason


def replies(core: EngineCore, requests: Sequence[Request]) -> dict[str, Reply]:
    """Runs requests until all have ended."""
    found = {request.id: Reply() for request in requests}
    core.inbox.submit(list(requests))
    while any(reply.finish_reason is None for reply in found.values()):
        if not core.has_work:
            core.inbox.wait()
        for update in step(core):
            found[update.request_id].take(update)
    return found


def step(core: EngineCore) -> list[TokenUpdate]:
    """Runs a step of all ranks and returns its updates."""
    result = core.step()
    if isinstance(core.inbox, LeadingInbox):
        core.inbox.results = checksum(result)
    return result.updates
