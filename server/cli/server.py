"""Runs uvicorn (the HTTP server) and the engine's client in one event loop, and shuts them down in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from jamba_server.engine.errors import EngineDead
from jamba_server.engine.nodes.client import NodesClient
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.read_ahead import reading_early
from jamba_server.engine.replicas.engines import Engines
from jamba_server.engine.types import EngineInfo
from jamba_server.server.cli.checkpoint import Checkpoint
from jamba_server.server.cli.reload import Reloader, Watched
from jamba_server.server.cli.terminal import LoadProgress, describe_engine, describe_role
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.http.connections.acceptor import REFUSALS
from jamba_server.server.http.connections.descriptors import connections_that_fit, raise_soft_limit
from jamba_server.server.http.connections.server import HttpServer
from jamba_server.server.http.connections.tls import tls_context
from jamba_server.server.http.lifecycle import Lifecycle
from jamba_server.server.http.limits.key_file import read_keys
from jamba_server.server.http.limits.keys import Keys
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.rendering.renderer import Renderer
from jamba_server.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
CANCEL_SECONDS = 2  # time in seconds in which request handlers must end after the engine has closed
# At shutdown, running requests first get some time to finish. After that time the process must end within this number
# of seconds. The engine takes at most 5 s to end, and the request handlers take at most CANCEL_SECONDS.
EXIT_SECONDS = 15
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
    """The HTTP server and the engine's client, which share one event loop."""

    def __init__(
        self,
        config: ServerConfig,
        checkpoint: Checkpoint,
        listener: socket.socket,
        progress: LoadProgress,
        templates: Renderer,
    ) -> None:
        max_connections = limit_connections(config)
        config = fit_queue(config, max_connections)
        self._config, self._listener, self._progress = config, listener, progress
        folder = checkpoint.folder
        self._defaults = GenerationDefaults.of(folder)
        # The disk reads the weights while this process reads the tokenizer. The engine goes on reading when it starts.
        with reading_early(folder, config.load_format):
            tokenizer = Tokenizer.from_folder(Path(config.tokenizer or folder))
            override = None if config.chat_template is None else Path(config.chat_template)
            template = ChatTemplate.from_folder(folder, tokenizer, override, templates)
        self._has_template = template is not None
        self._client = open_engine(config, folder, progress.update)
        app = create_app(config, self._client, tokenizer, template, self._defaults, demo=checkpoint.demo)
        self._lifecycle: Lifecycle = app.state.lifecycle
        if template is not None:
            logger.info("replies   the server %s", app.state.services.reply_style.describe())
        self._http = HttpServer(
            http_config(config, app),
            listener,
            max_connections=max_connections,
            header_timeout=config.header_timeout,
            send_timeout=config.send_timeout,
            counts=app.state.services.edge.connections,
            tls=tls_context(config),
        )
        self._reloader = Reloader(watched_files(config, app.state.services.edge.keys, self._http))
        self._stop = asyncio.Event()
        self._guard: threading.Timer | None = None  # a timer that ends the process if the shutdown takes too long

    def run(self) -> None:
        """Serves requests until SIGINT or SIGTERM. Raises ConfigError if the engine cannot start, and EngineDead if it
        cannot be restarted and the option exit_on_dead is set."""
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._run())
        finally:
            if self._guard is not None:
                self._guard.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        if self._reloader.active:
            loop.add_signal_handler(signal.SIGHUP, self._reloader.read_all)
        reloader = asyncio.create_task(self._reloader.watch(), name="reloader")
        http = asyncio.create_task(self._http.serve(), name="http")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            if await self._start(http, stop):
                dead = asyncio.create_task(self._until_dead(), name="engine death")
                await asyncio.wait((http, stop, dead), return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
                if dead.done() and not stop.done():
                    dead.result()
                dead.cancel()
        finally:
            stop.cancel()
            reloader.cancel()
            await self._client.close()
            self._http.should_exit = True
            await http

    async def _start(self, http: asyncio.Task[None], stop: asyncio.Task[bool]) -> bool:
        """Waits until the engine has loaded the model or a signal to stop has come. Returns true if the model was
        loaded first. Raises ConfigError."""
        start = asyncio.create_task(self._client.start(), name="engine start")
        await asyncio.wait((start, http, stop), return_when=asyncio.FIRST_COMPLETED)
        self._progress.stop()
        if not start.done():
            start.cancel()
            return False
        info = start.result()
        for line in (*describe_engine(info, self._defaults), *describe_role(self._config)):
            logger.info("%s", line)
        for warning in self._warnings(info):
            logger.warning("%s", warning)
        logger.info("%s", self._invitation())
        return True

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("A second signal has come: the server stops at once.")
            # The engine process ends by itself when the socket between the engine and this process closes.
            os._exit(128 + number)
        logger.info(
            "%s: the server takes no new requests; running requests have %g s to finish",
            number.name,
            self._config.shutdown_timeout,
        )
        self._lifecycle.drain()
        self._stop.set()
        # The timer runs in a thread of its own. So it ends the process even if the event loop hangs, or a thread for
        # which Python waits at exit.
        self._guard = threading.Timer(self._config.shutdown_timeout + EXIT_SECONDS, _exit)
        self._guard.daemon = True
        self._guard.start()

    async def _until_dead(self) -> None:
        """Waits until the engine cannot be restarted, and then raises EngineDead. Waits for ever without the option
        exit_on_dead."""
        reason = await self._client.ended()
        if not self._config.exit_on_dead:
            await asyncio.Event().wait()
        self._lifecycle.drain()
        raise EngineDead(f"the engine is gone for good: {reason}")

    async def _drain(self) -> None:
        """Waits until the running requests have ended, for at most --shutdown-timeout seconds. Meanwhile /ready answers
        503."""
        if running := set(self._http.server_state.tasks):
            _, remaining = await asyncio.wait(running, timeout=self._config.shutdown_timeout)
            if remaining:
                logger.warning("%d requests are cut off, because --shutdown-timeout is over", len(remaining))

    def _warnings(self, info: EngineInfo) -> list[str]:
        if info.labels:
            unused = "classify_labels is ignored: the model is a classifier, which has labels of its own"
            return [*info.warnings, *([unused] if self._config.classify_labels else [])]
        if self._has_template:
            return [*info.warnings]
        return [*info.warnings, "the model has no chat template: /v1/chat/completions needs --chat-template"]

    def _invitation(self) -> str:
        """Returns the log line with the addresses of the API and the chat page, and a curl command for a request."""
        config = self._config
        address: tuple[str, int] = self._listener.getsockname()[:2]
        host, port = address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http{'s' if config.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"
        if config.role == "prefill":
            return f"ready     listening on {url}; give this address to decode servers: --prefill-url {url}"
        chat, completion = {"messages": [{"role": "user", "content": "Hello!"}]}, {"prompt": "Hello"}
        path, body = ("v1/chat/completions", chat) if self._has_template else ("v1/completions", completion)
        if self._client.info.labels:
            path, body = "classify", {"input": "Hello"}
        key = " -H 'Authorization: Bearer YOUR_KEY'" if config.needs_key else ""
        page = f"chat page at {url}/; " if config.ui else ""
        return (
            f"ready     listening on {url}/v1 as {', '.join(config.served_model_name)}; {page}try: "
            f"curl {url}/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
        )


def open_engine(config: ServerConfig, model: Path, on_progress: Callable[[str, float], None]) -> EngineClient | Engines:
    """Returns the engine for the folder or file `model`, which has not been started: one, or several that look like
    one. Raises ConfigError for options that do not work with several."""
    settings: dict[str, Any] = {
        "engine_timeout": config.engine_timeout,
        "load_timeout": config.load_timeout,
        "max_queue_requests": config.max_queue_requests,
        "on_progress": on_progress,
    }
    if (nodes := config.nodes()) is not None:
        return NodesClient(config.engine(model), nodes, **settings)
    if config.data_parallel_size > 1:
        return Engines(config.engine(model), config.data_parallel_size, **settings)
    return EngineClient(config.engine(model), **settings)


def _exit() -> None:
    logger.warning("The server has not stopped in time: it ends at once.")
    os._exit(0)


def http_config(config: ServerConfig, app: FastAPI) -> uvicorn.Config:
    """Returns uvicorn's configuration. TLS is not part of the configuration, because the class `HttpServer` sets up TLS
    when it accepts connections."""
    result = uvicorn.Config(
        app,
        http="h11",  # h11 is the only HTTP parser of uvicorn that limits the size of a request's headers
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",  # `jamba serve` logs the start and the stop itself
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.keep_alive_timeout,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
    result.load()
    return result


def limit_connections(config: ServerConfig) -> int:
    """Raises the limit of open files and returns how many connections are served at the same time."""
    fitting = connections_that_fit(raise_soft_limit(), refusals=REFUSALS)
    if config.max_connections is None:
        return fitting
    if config.max_connections > fitting:
        logger.warning(
            "max_connections %d is reduced to %d, because of the limit of open files (ulimit -n)",
            config.max_connections, fitting,
        )  # fmt: skip
    return min(config.max_connections, fitting)


def fit_queue(config: ServerConfig, max_connections: int) -> ServerConfig:
    """Returns the configuration with `max_queue_requests` reduced, if necessary, so that all running and waiting
    requests fit into `max_connections` connections."""
    room = max(1, max_connections - config.max_num_seqs * config.data_parallel_size)
    if config.max_queue_requests <= room:
        return config
    logger.warning(
        "max_queue_requests %d is reduced to %d, because at most %d connections are served (max_connections)",
        config.max_queue_requests, room, max_connections,
    )  # fmt: skip
    return replace(config, max_queue_requests=room)


def watched_files(config: ServerConfig, keys: Keys, http: HttpServer) -> list[Watched]:
    """Returns the files that are read again when they change."""
    watched: list[Watched] = []
    if (path := config.api_key_file) is not None:

        def read_key_file() -> None:
            keys.replace(read_keys(config.api_key, path))

        watched.append(Watched(name="the API keys", paths=(path,), read=read_key_file))
    if config.ssl_certfile is not None and config.ssl_keyfile is not None:

        def read_certificate() -> None:
            http.tls = tls_context(config)

        paths = (config.ssl_certfile, config.ssl_keyfile)
        watched.append(Watched(name="the TLS certificate", paths=paths, read=read_certificate))
    return watched
