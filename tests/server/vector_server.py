"""Applications on real engines of tiny models, which run in the test's own process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jamba_server.engine.core import EngineCore
from jamba_server.engine.process.client import Health, SupervisionStats
from jamba_server.engine.types import EngineInfo, EngineStats, Request, TokenUpdate
from jamba_server.engine.validation import validate_kind
from jamba_server.llm import LLM
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import NAMES, TEMPLATE, Bench
from tests.synthetic_tokenizer import write_tokenizer
from tests.tiny import save_tiny


class LocalStream:
    """The updates of requests. Whoever waits for one runs the engine's next step."""

    def __init__(self, engine: LocalEngine, requests: list[Request]) -> None:
        self.open, self.updates = {request.id for request in requests}, deque[TokenUpdate]()
        self._engine = engine

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> TokenUpdate:
        if not self.open:
            raise StopAsyncIteration
        while not self.updates:
            await asyncio.sleep(0)  # others may submit what then runs in the same step
            if not self.updates:
                self._engine.step()
        update = self.updates.popleft()
        if update.finish_reason:
            self.open.discard(update.request_id)
        return update

    def abort(self, request_id: str) -> None:
        self.open.discard(request_id)
        self._engine.core.inbox.abort([request_id])


class LocalEngine:
    """Implements `process.client.Engine` without a process. `requests` are all that it was ever asked for."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.health = Health(alive=True, ready=True)
        self.supervision = SupervisionStats()
        self.requests: list[Request] = []
        self._streams: dict[str, LocalStream] = {}

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    @property
    def stats(self) -> EngineStats:
        return self.core.scheduler.stats

    async def first_start(self) -> None:
        pass

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[LocalStream]:
        for request in requests:
            validate_kind(request.kind, self.info)
        stream = LocalStream(self, requests)
        self.requests += requests
        self._streams |= {request.id: stream for request in requests}
        self.core.inbox.submit(requests)
        try:
            yield stream
        finally:
            self.core.inbox.abort(sorted(stream.open))

    def step(self) -> None:
        for update in self.core.step().updates:
            self._streams[update.request_id].updates.append(update)


def serve_model(folder: Path, *, template: bool = True, **config: Any) -> Bench:
    """An application on the model in `folder`."""
    llm = LLM(folder, max_model_len=1024, threads=1)
    tokenizer = Tokenizer.from_folder(folder)
    settings = ServerConfig(served_model_name=NAMES, **config)
    chat_template = ChatTemplate(TEMPLATE, tokenizer) if template else None
    engine: Any = LocalEngine(llm.core)
    return Bench(create_app(settings, engine, tokenizer, chat_template, GenerationDefaults(), demo=False), engine)


def save_model(folder: Path, **overrides: Any) -> Any:
    """Saves a tiny random model with a tokenizer, and returns transformers' model."""
    oracle = save_tiny(folder, vocab_size=2048, **overrides)
    write_tokenizer(folder, "jamba-1.5")
    return oracle
