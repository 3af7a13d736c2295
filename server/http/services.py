"""What the routes of one application work with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from jamba_server.engine.errors import ModelNotFound, RequestRejected
from jamba_server.engine.process.client import Engine
from jamba_server.server.config import GenerationDefaults, ServerConfig
from jamba_server.server.http.generation import Generation, GenerationSpec
from jamba_server.server.http.lifecycle import Lifecycle
from jamba_server.server.http.metrics import Metrics
from jamba_server.server.http.schemas.chat import ChatMessage
from jamba_server.server.text.chat_template import ChatTemplate, RenderedChat
from jamba_server.server.text.tokenizer import Tokenizer

T = TypeVar("T")

TEXT_THREADS = 4  # templates and tokenisers: more would only take cores from the engine


def _draw_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    config: ServerConfig
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    metrics: Metrics
    demo: bool
    version: str
    longest_token: int  # in bytes
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    draw_seed: Callable[[], int] = _draw_seed
    created: int = field(default_factory=lambda: int(time.time()))
    threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(TEXT_THREADS))

    def model(self, wish: str | None) -> str:
        """The served name that a request means; the first one if it names none. Raises ModelNotFound."""
        served = self.config.served_model_name
        if wish is None:
            return served[0]
        if wish not in served:
            raise ModelNotFound(wish, served=served)
        return wish

    def generation(self, spec: GenerationSpec) -> Generation:
        return Generation(spec, self.engine, self.tokenizer, self.metrics)

    def check_size(self, text: str, *, param: str) -> None:
        """Raises RequestRejected for a text that cannot fit the context however its tokens fall: tokenising megabytes
        takes seconds."""
        size, limit = len(text.encode()), self.engine.info.max_model_len
        if size > limit * self.longest_token:
            raise RequestRejected(
                f"This model's maximum context length is {limit} tokens; the prompt has {size} bytes, and no token is "
                f"longer than {self.longest_token}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await self.in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def render(self, messages: list[ChatMessage], *, add_generation_prompt: bool = True) -> RenderedChat:
        template = self.chat_template
        if template is None:
            raise RequestRejected(
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        turns = [message.to_template() for message in messages]
        self.check_size("".join(str(turn.get("content") or "") for turn in turns), param="messages")
        return await self.in_thread(lambda: template.render(turns, add_generation_prompt=add_generation_prompt))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """For work that takes long enough to hold up the event loop, and with it the streams of other requests."""
        return await anyio.to_thread.run_sync(work, limiter=self.threads)


async def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesOf = Annotated[Services, Depends(_services)]
