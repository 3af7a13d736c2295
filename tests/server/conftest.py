"""The application on a fake engine, and three ways to talk to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI

from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, says
from tests.synthetic_tokenizer import write_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|bom|><|{{ message.role }}|> {% if message.name %}({{ message.name }}){% endif %}"
    "{{ message.content }}<|eom|>{% endfor %}{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
)
NAMES: Any = ("jamba", "alias")
HELLO = " hello the world"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "jamba-1.5")
    return Tokenizer.from_folder(folder)


Ids = Callable[[str], list[int]]


@pytest.fixture
def ids(tokenizer: Tokenizer) -> Ids:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def engine(ids: Ids) -> FakeEngine:
    """An engine that generates the text HELLO, unless a test gives it another script."""
    return FakeEngine(says(ids(HELLO)))


@dataclass
class Bench:
    """An application and its engine."""

    app: FastAPI
    engine: FakeEngine

    def http(self, **kwargs: Any) -> httpx.AsyncClient:
        """Returns a client that calls the application without a socket. A reply is complete before the caller sees any
        of it."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server", **kwargs)

    @asynccontextmanager
    async def served(self) -> AsyncGenerator[str]:
        """Serves the application with uvicorn on a free port of the loopback interface. Yields the address."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(self.app, http="h11", log_config=None, timeout_graceful_shutdown=5)
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve([listener]))
            try:
                while not server.started:
                    await asyncio.sleep(0.005)
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                await task

    @asynccontextmanager
    async def openai(self, api_key: str = "none") -> AsyncGenerator[AsyncOpenAI]:
        """The official client, over a socket."""
        async with (
            self.served() as address,
            AsyncOpenAI(base_url=f"{address}/v1", api_key=api_key, max_retries=0) as client,
        ):
            yield client


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(tokenizer: Tokenizer, engine: FakeEngine) -> MakeBench:
    def make(
        *,
        defaults: GenerationDefaults | None = None,
        demo: bool = False,
        template: str | None = TEMPLATE,
        chat_template: ChatTemplate | None = None,
        engine: FakeEngine = engine,
        **settings: Any,
    ) -> Bench:
        config = ServerConfig(**({"served_model_name": NAMES} | settings))
        if template and chat_template is None:
            chat_template = ChatTemplate(template, tokenizer)
        app = create_app(config, engine, tokenizer, chat_template, defaults or GenerationDefaults(), demo=demo)
        return Bench(app, engine)

    return make


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()


OpenAIClient = AbstractAsyncContextManager[AsyncOpenAI]


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"messages": [{"role": "user", "content": "Hi"}], **fields}
