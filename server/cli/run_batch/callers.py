"""Runs single requests: with a model in this process, or at a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import httpx
from fastapi import FastAPI
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.checkpoint import Checkpoint
from jamba_server.server.cli.local import start_engine
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import ROUTERS, create_app
from jamba_server.server.http.batches.call import Outcome, call
from jamba_server.server.http.batches.endpoints import lines_app
from jamba_server.server.http.errors import OnProgress
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer

ATTEMPTS = 5  # number of attempts to reach a server
RETRY_SECONDS = 1.0
RETRIED = (429, 503)  # a server answers with these statuses when it cannot take a request now
REFUSED = (401, 403)  # a server answers with these statuses if it does not accept the API key


class Caller(Protocol):
    async def __call__(self, path: str, body: bytes, on_progress: OnProgress) -> Outcome:
        """Returns the reply of an endpoint. Tells `on_progress` what is known of the progress of the request."""
        ...


@dataclass(frozen=True, slots=True)
class LocalCaller:
    """Calls the endpoints of an application in this process."""

    app: FastAPI

    async def __call__(self, path: str, body: bytes, on_progress: OnProgress) -> Outcome:
        return await call(self.app, path, body, owner="", background=False, on_progress=on_progress)


@dataclass(frozen=True, slots=True)
class RemoteCaller:
    """Sends requests to a server. While the server cannot take a request, it is sent again. Raises ConfigError if the
    server cannot be reached or does not accept the API key, because no other request would succeed either."""

    http: httpx.AsyncClient

    async def __call__(self, path: str, body: bytes, on_progress: OnProgress) -> Outcome:
        attempt = 1
        while True:
            try:
                reply = await self.http.post(path, content=body, headers={"Content-Type": "application/json"})
            except httpx.TransportError as error:
                if attempt == ATTEMPTS:
                    raise ConfigError(
                        f"The server {self.http.base_url} cannot be reached: {error!r}. The same command goes on where "
                        "this one has stopped."
                    ) from error
                attempt += 1
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if reply.status_code in REFUSED:
                raise ConfigError(
                    f"The server {self.http.base_url} does not accept the API key (status {reply.status_code}): give "
                    "one with --api-key. The same command goes on where this one has stopped."
                )
            if reply.status_code not in RETRIED:
                return Outcome(reply.status_code, reply.headers.get("x-request-id", ""), as_json(reply))
            after = reply.headers.get("retry-after", "")
            await asyncio.sleep(float(after) if after.isdecimal() else RETRY_SECONDS)


def as_json(reply: httpx.Response) -> bytes:
    """Returns the body of a reply. If it is no JSON, because a proxy has answered, returns it as a JSON text."""
    try:
        reply.json()
    except ValueError:
        return httpx.Response(200, json=reply.text[:1000]).content
    return reply.content


@asynccontextmanager
async def local(config: ServerConfig, checkpoint: Checkpoint, console: Console) -> AsyncGenerator[LocalCaller]:
    """Loads a model. Raises ConfigError if it cannot be loaded."""
    # The environment and the YAML file may have options of a server. This process has no other clients that a limit
    # would protect, and must not touch the data of a server.
    config = replace(config, data_dir=None, max_queue_requests=0, max_queue_tokens=0)
    folder = checkpoint.folder
    tokenizer = Tokenizer.from_folder(Path(config.tokenizer or folder))
    override = None if config.chat_template is None else Path(config.chat_template)
    template = ChatTemplate.from_folder(folder, tokenizer, override)
    client = await start_engine(config, folder, console)
    try:
        app = create_app(config, client, tokenizer, template, GenerationDefaults.of(folder), demo=checkpoint.demo)
        services = app.state.services
        try:
            yield LocalCaller(lines_app(services, ROUTERS))
        finally:
            await services.responses.close()
            services.grammars.close()
    finally:
        await client.close()


@asynccontextmanager
async def remote(url: str, api_key: str | None) -> AsyncGenerator[RemoteCaller]:
    """Connects to the server at `url`, which may end with /v1."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None)
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"--url is {url!r}; it must begin with http:// or https://.")
    try:
        http = httpx.AsyncClient(base_url=base, headers=headers, timeout=None, limits=limits)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url {url!r}: {error}.") from error
    async with http:
        yield RemoteCaller(http)
