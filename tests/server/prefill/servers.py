"""Prefill and decode servers on real engines with the demonstration checkpoint, and a proxy between them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
from fastapi import FastAPI

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench

INNER_KEY = "the prefill server's key"
MIN_TOKENS = 48
COUNT = re.compile(r'^jamba_prefill_hand_overs_total\{model_name="jamba-demo",result="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass
class Served:
    """A server: its address, its application and its engine."""

    url: str
    app: FastAPI
    engine: EngineClient

    def http(self, key: str = "one") -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    async def results(self) -> dict[str, int]:
        """Returns the number of hand-overs with each result, as /metrics has it."""
        async with self.http() as http:
            text = (await http.get("/metrics")).text
        return {name: int(float(number)) for name, number in COUNT.findall(text) if float(number)}


def config(disk: Path | None, **settings: Any) -> ServerConfig:
    defaults: dict[str, Any] = {
        "served_model_name": ("jamba-demo",),
        "dtype": "float32",
        "threads": 1,
        "max_num_seqs": 8,
        "api_key": ("one", "two"),
        "state_cache_disk_path": None if disk is None else str(disk),
    }
    return ServerConfig(**(defaults | settings))


def prefill_config(disk: Path, **settings: Any) -> ServerConfig:
    return config(disk, role="prefill", api_key=(INNER_KEY,), **settings)


def decode_config(disk: Path, *urls: str, **settings: Any) -> ServerConfig:
    own = {"prefill_api_key": INNER_KEY, "prefill_min_tokens": MIN_TOKENS} | settings
    return config(disk, role="decode", prefill_url=urls, **own)


async def start(config: ServerConfig) -> EngineClient:
    """Returns an engine whose disk tier is open, if it has one."""
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    while config.state_cache_disk_path and not (engine.stats.tiers and engine.stats.tiers.fingerprint):
        await asyncio.sleep(0.01)
    return engine


@asynccontextmanager
async def served(config: ServerConfig, engine: EngineClient) -> AsyncGenerator[Served]:
    """Serves an engine that has been started. The engine is not closed at the end."""
    tokenizer = Tokenizer.from_folder(demo_folder())
    template = ChatTemplate.from_folder(demo_folder(), tokenizer, None)
    app = create_app(config, engine, tokenizer, template, GenerationDefaults(), demo=True)
    async with Bench(app, cast(Any, engine)).served() as url:
        yield Served(url, app, engine)


def long_text(name: str, words: int = 60) -> str:
    """A text of more than `MIN_TOKENS` tokens that begins like no other."""
    return f"{name}: " + " ".join(f"once upon a time there was a dog {number}" for number in range(words // 8))


@contextmanager
def nobody() -> Generator[str]:
    """The address of a port at which no server listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


Change = Callable[[bytes], bytes]


@dataclass
class Between:
    """A proxy in front of a prefill server. `change` gets each piece of the file of a segment, and returns what is
    passed on. With `holds` set, nothing of a reply is passed on."""

    target: str
    change: Change = field(default=lambda data: data)
    holds: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)  # a request has come
    left: asyncio.Event = field(default_factory=asyncio.Event)  # its client has closed the connection
    url: str = ""

    @asynccontextmanager
    async def served(self) -> AsyncGenerator[Between]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.removeprefix("http://").split(":")
        try:
            upstream, upward = await asyncio.open_connection(host, int(port))
        except OSError:  # the server was killed
            writer.close()
            return
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._requests(reader, upward), self._replies(upstream, writer))
        for end in (writer, upward):
            end.close()

    async def _requests(self, reader: asyncio.StreamReader, upward: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            upward.write(data)
            self.asked.set()
        self.left.set()
        upward.close()

    async def _replies(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        in_segment = False
        while data := await upstream.read(1 << 16):
            if self.holds:
                continue
            head = b""
            if b"application/octet-stream" in data and not in_segment:
                in_segment = True
                head, end, data = data.partition(b"\r\n\r\n")
                head += end
            writer.write(head + (self.change(data) if in_segment and data else data))
        writer.close()
