"""The application on the real engine, with the demonstration checkpoint, behind uvicorn."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

from openai import AsyncOpenAI

from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.replicas.engines import Engines
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench


@asynccontextmanager
async def served_engine(
    config: ServerConfig, engine: EngineClient | Engines, defaults: GenerationDefaults | None = None
) -> AsyncGenerator[AsyncOpenAI]:
    """`engine` has been started. Requests without a seed get 1000, 1001, ..., in the order of their arrival."""
    folder = demo_folder()
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer, None)
    app = create_app(config, engine, tokenizer, template, defaults or GenerationDefaults(), demo=True)
    seeds = itertools.count(1000)
    app.state.services = dataclasses.replace(app.state.services, draw_seed=lambda: next(seeds))
    async with Bench(app, cast(Any, engine)).openai() as client:
        yield client
