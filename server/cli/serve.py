"""`jamba serve`: from an address and a checkpoint to a running server, and its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.client import EngineClient
from jamba_server.server.cli.checkpoint import Checkpoint, find_checkpoint
from jamba_server.server.cli.health import url_of, written_down
from jamba_server.server.cli.settings import ALL, Model, with_options
from jamba_server.server.cli.terminal import LoadProgress, describe_engine
from jamba_server.server.config import GenerationDefaults, ServerConfig
from jamba_server.server.demo import DESCRIPTION
from jamba_server.server.http.app import create_app, package_version
from jamba_server.server.http.lifecycle import Lifecycle
from jamba_server.server.http.logs import configure_logging
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_SECONDS = 75  # longer than the proxies in front (nginx: 60), so that none sends into a closing connection
CANCEL_SECONDS = 2  # for what still runs after the engine has closed
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@with_options(ALL)
def serve(config: ServerConfig, model: Model = None) -> None:
    """Serve a model behind OpenAI's API."""
    configure_logging(config.log_level.upper())
    listener = bind(config.host, config.port)  # before a model is downloaded or loaded in vain
    with listener, written_down(url_of(listener, tls=config.ssl_certfile is not None), config.address_file):
        checkpoint = find_checkpoint(config)
        if not config.served_model_name:
            config = replace(config, served_model_name=(checkpoint.name,))
        server = Server(config, checkpoint, listener, Console(stderr=True))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.run())


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address. Raises ConfigError with the reason."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # a second server that holds the port would be found here
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port {port} of --host {host} cannot be used: {error.strerror}.") from error
    return listener


class Server:
    """The HTTP server and the engine's client in one event loop."""

    def __init__(self, config: ServerConfig, checkpoint: Checkpoint, listener: socket.socket, console: Console) -> None:
        self._config, self._listener, self._console = config, listener, console
        folder = checkpoint.folder
        self._defaults = GenerationDefaults.of(folder)
        tokenizer = Tokenizer.from_folder(folder)
        override = None if config.chat_template is None else Path(config.chat_template)
        template = ChatTemplate.from_folder(folder, tokenizer, override)
        self._has_template = template is not None
        self._progress = LoadProgress(console)
        self._client = EngineClient(
            config.engine(folder),
            engine_timeout=config.engine_timeout,
            max_queue_requests=config.max_queue_requests,
            on_progress=self._progress.update,
        )
        app = create_app(config, self._client, tokenizer, template, self._defaults, demo=checkpoint.demo)
        self._lifecycle: Lifecycle = app.state.lifecycle
        self._http = HttpServer(http_config(config, app))
        self._stop = asyncio.Event()
        self._greet(checkpoint)

    async def run(self) -> None:
        """Until a signal. Raises ConfigError if the engine cannot start."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]), name="http")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            if await self._start(http, stop):
                await asyncio.wait((http, stop), return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
        finally:
            stop.cancel()
            await self._client.close()
            self._http.should_exit = True
            await http

    async def _start(self, http: asyncio.Task[None], stop: asyncio.Task[bool]) -> bool:
        """True when the engine is ready, False where the server is stopped before. Raises ConfigError."""
        start = asyncio.create_task(self._client.start(), name="engine start")
        with self._progress:
            await asyncio.wait((start, http, stop), return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            return False
        for line in (*describe_engine(start.result(), self._defaults), *self._invitation()):
            self._say(line)
        return True

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("second signal: stopping at once")
            os._exit(128 + number)  # the engine ends by itself when its socket closes
        logger.info("%s: no new requests; those that run have %g s", number.name, self._config.shutdown_timeout)
        self._lifecycle.drain()
        self._stop.set()

    async def _drain(self) -> None:
        """Waits until the requests that run have been answered; /ready keeps answering 503 meanwhile."""
        if running := set(self._http.server_state.tasks):
            _, remaining = await asyncio.wait(running, timeout=self._config.shutdown_timeout)
            if remaining:
                logger.warning("%d requests are cut off after --shutdown-timeout", len(remaining))

    # What people see --------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _greet(self, checkpoint: Checkpoint) -> None:
        what = DESCRIPTION if checkpoint.demo else str(checkpoint.folder)
        self._say(f"jamba-server {package_version()}: {what}")
        self._say(f"options   {json.dumps(self._config.non_defaults(), ensure_ascii=False)}")
        if not self._has_template:
            self._say("warning   the checkpoint has no chat template: /v1/chat/completions needs --chat-template")
        if not self._config.api_key and not is_loopback(self._config.host):
            self._say(f"warning   listening on {self._config.host} without --api-key: whoever reaches it may use it")

    def _invitation(self) -> list[str]:
        """The address, and a request to paste."""
        config = self._config
        address: tuple[str, int] = self._listener.getsockname()[:2]
        host, port = address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http{'s' if config.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        chat, completion = {"messages": [{"role": "user", "content": "Hello!"}]}, {"prompt": "Hello"}
        path, body = ("chat/completions", chat) if self._has_template else ("completions", completion)
        key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key else ""
        return [
            f"ready     {url}/v1 serves {', '.join(config.served_model_name)}; {url}/docs describes it",
            f"try       curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'",
        ]


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: it would close its sockets at once, and /ready could not say 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def http_config(config: ServerConfig, app: FastAPI) -> uvicorn.Config:
    """Raises ConfigError for a key or certificate that cannot be used."""
    result = uvicorn.Config(
        app,
        http="h11",  # the only one of uvicorn's parsers that bounds the size of a request's headers
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",  # what it says of starting and stopping, this command says better
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CANCEL_SECONDS,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
    )
    try:
        result.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"ssl_keyfile and ssl_certfile cannot be used: {error}.") from error
    return result


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
