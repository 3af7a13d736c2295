"""The function `create_app` builds the FastAPI application from the configuration, the engine and the tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from jamba_server.engine.errors import EngineError
from jamba_server.engine.process.client import Engine
from jamba_server.engine.replicas.engines import Engines
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.batches.runner import BatchRunner
from jamba_server.server.http.batches.store import BatchStore
from jamba_server.server.http.errors import error_response
from jamba_server.server.http.files.store import FileStore
from jamba_server.server.http.grammar_queue import GrammarQueue
from jamba_server.server.http.lifecycle import StartupQueue
from jamba_server.server.http.limits.edge import Edge
from jamba_server.server.http.limits.key_limits import RATE_HEADERS, KeyLimits
from jamba_server.server.http.limits.metrics import EdgeCollector
from jamba_server.server.http.limits.queue_gate import QueueGate
from jamba_server.server.http.logs import log_stats
from jamba_server.server.http.loop_lag import measure_lag
from jamba_server.server.http.metrics import Metrics
from jamba_server.server.http.middleware import ASSETS_PATH, OPEN_PATHS, PROBE_PATHS, ApiKey, JsonBody, RequestContext
from jamba_server.server.http.openapi import App
from jamba_server.server.http.page.files import ChatPage
from jamba_server.server.http.prefill.counts import HandOverCollector
from jamba_server.server.http.prefill.engine import DecodeEngine
from jamba_server.server.http.prefill.tier import TierFolder
from jamba_server.server.http.replica_metrics import ReplicaCollector
from jamba_server.server.http.routes import (
    batches,
    chat,
    classify,
    completions,
    decisions,
    embeddings,
    files,
    messages,
    models,
    operations,
    pages,
    prefill,
    render,
    responses,
    scoring,
    session_files,
    sessions,
    streams,
    tokenize,
)
from jamba_server.server.http.services import Services
from jamba_server.server.http.store.responses import ResponseStore
from jamba_server.server.http.streams.headers import STREAM_ID
from jamba_server.server.http.streams.metrics import StreamCollector
from jamba_server.server.http.streams.registry import KeptStreams
from jamba_server.server.http.streams.resumption import Resumption
from jamba_server.server.http.tracing.setup import open_tracing
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.grammars.builder import grammar_builder
from jamba_server.server.text.reply_style import find_reply_style
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.version import package_version

if TYPE_CHECKING:
    from jamba_server.server.http.prefill.hand_overs import HandOvers

# Web pages of other origins may read these headers of replies.
SHOWN_HEADERS = ("X-Request-Id", "X-Ignored-Fields", "X-Warning", "Retry-After", STREAM_ID)

ROUTERS = (
    chat.router,
    render.router,
    completions.router,
    responses.router,
    sessions.router,
    session_files.router,
    messages.router,
    files.router,
    batches.router,
    embeddings.router,
    classify.router,
    scoring.router,
    decisions.router,
    models.router,
    streams.router,
    tokenize.router,
    operations.router,
    pages.router,
)

# The routes of a server of role `prefill`, which has no clients but decode servers.
PREFILL_ROUTERS = (prefill.router, models.router, tokenize.router, operations.router, pages.router)


def create_app(
    config: ServerConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    defaults: GenerationDefaults,
    *,
    demo: bool,
) -> FastAPI:
    """Returns the application that serves `engine` over HTTP. The engine may still be loading.

    A call of the method `app.state.lifecycle.drain()` makes the application refuse new requests. The list
    `config.served_model_name` must not be empty. The metrics have the first name of this list as a label.
    """
    assert config.served_model_name, "the caller names the model"
    tier = TierFolder(config, engine)
    hand_overs = _open_hand_overs(config, engine, tier) if config.role == "decode" else None
    services = Services(
        config=config,
        engine=engine if hand_overs is None else DecodeEngine(engine, hand_overs),
        tier=tier,
        hand_overs=hand_overs,
        tokenizer=tokenizer,
        chat_template=chat_template,
        defaults=defaults,
        metrics=Metrics(engine, model_name=config.served_model_name[0], names=config.metrics_names),
        demo=demo,
        version=package_version(),
        edge=Edge.of(config, lambda: engine.stats),
        tracing=open_tracing(config.otlp_traces_endpoint, package_version()),
        startup=StartupQueue(engine, seconds=config.startup_wait, max_waiting=config.max_queue_requests),
        responses=_response_store(config),
        files=FileStore(_data(config), max_bytes=config.max_file_bytes),
        batches=BatchStore(_data(config), enabled=config.max_file_bytes > 0),
        streams=KeptStreams.of(config),
        page=ChatPage.read(config.root_path) if config.ui and config.role != "prefill" else None,
        grammars=GrammarQueue(grammar_builder(tokenizer)),
        reply_style=find_reply_style(
            chat_template, tokenizer, tool_calls=config.tool_call_parser, reasoning=config.reasoning_parser
        ),
        longest_token=max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)),
    )
    _register_metrics(services, engine)
    open_paths = OPEN_PATHS | {"/metrics"} if config.metrics_public else OPEN_PATHS
    app = App(
        open_paths=open_paths if config.needs_key else None,
        title="jamba-server",
        description="Jamba models behind OpenAI's API.",
        version=services.version,
        middleware=_middleware(services, open_paths),
        lifespan=_lifespan,
        docs_url=None,  # routes/pages.py serves /docs, because FastAPI's own page loads scripts from the internet
        redoc_url=None,
        # The middleware removes a slash at the end of a path. FastAPI's redirect would lack a proxy's prefix and TLS.
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.lifecycle = services.lifecycle
    _add_routes(app, PREFILL_ROUTERS if config.role == "prefill" else ROUTERS)
    return app


def _open_hand_overs(config: ServerConfig, engine: Engine, tier: TierFolder) -> HandOvers:
    # It imports httpx, which takes a tenth of a second.
    from jamba_server.server.http.prefill.hand_overs import HandOvers

    return HandOvers(config, engine, tier)


def _register_metrics(services: Services, engine: Engine) -> None:
    name, registry, hand_overs = services.metrics.model_name, services.metrics.registry, services.hand_overs
    registry.register(EdgeCollector(name, services.edge))
    registry.register(StreamCollector(name, services.streams))
    if isinstance(engine, Engines):
        registry.register(ReplicaCollector(name, engine))
    if hand_overs is not None:
        registry.register(HandOverCollector(name, hand_overs.counts, hand_overs.in_flight))


def _response_store(config: ServerConfig) -> ResponseStore:
    return ResponseStore(_data(config), max_responses=config.max_stored_responses, max_bytes=config.max_stored_bytes)


def _data(config: ServerConfig) -> Path | None:
    return Path(config.data_dir) if config.data_dir else None


def _add_routes(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    for router in routers:
        app.include_router(router)
    app.mount(ASSETS_PATH, pages.swagger_assets())
    for kind in (EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)


def _middleware(services: Services, open_paths: frozenset[str]) -> list[Middleware]:
    """Returns the middleware, from the outermost to the innermost.

    The CORS middleware encloses all middleware that may refuse a request, so that error replies have CORS headers, too.
    A browser hides replies without CORS headers from the web page that sent the request.
    """
    config, edge = services.config, services.edge
    chain: list[Middleware] = []
    if config.allowed_origins:
        chain.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allowed_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[*SHOWN_HEADERS, *RATE_HEADERS],
            )
        )
    if services.tracing is not None:
        ignored = PROBE_PATHS | {"/metrics"}
        chain.append(services.tracing.middleware(ignored | {f"{config.root_path}{path}" for path in ignored}))
    tls = config.ssl_certfile is not None
    chain.append(Middleware(RequestContext, metrics=services.metrics, root_path=config.root_path, tls=tls))
    if config.needs_key:
        chain += [Middleware(ApiKey, keys=edge.keys, open_paths=open_paths), Middleware(KeyLimits, keys=edge.keys)]
    if config.max_queue_requests:
        most = config.max_queue_requests + config.max_num_seqs * config.data_parallel_size
        chain.append(Middleware(QueueGate, waiting=edge.waiting, limit=most))
    body = Middleware(JsonBody, max_bytes=config.max_body_bytes, memory=edge.bodies, whole_timeout=config.body_timeout)
    resumption = Middleware(Resumption, streams=services.streams, send_timeout=config.send_timeout)
    return [*chain, body, resumption]


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    services: Services = app.state.services
    # The library anyio imports some of its modules when it is first used, so it is used once here. Later the import
    # could fail, because a flood of requests may have taken all file descriptors.
    await anyio.to_thread.run_sync(lambda: None)
    tasks = [
        asyncio.create_task(log_stats(services.metrics, services.engine), name="statistics"),
        asyncio.create_task(measure_lag(services.metrics.loop_lag), name="event loop lag"),
    ]
    runner = BatchRunner(services, ROUTERS)
    runner.start()
    yield
    await runner.close()
    if services.hand_overs is not None:
        await services.hand_overs.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    services.streams.close()
    await services.responses.close()
    await services.batches.close()
    await services.files.close()
    # Runs in a thread, because `close` may have to wait until the check of a grammar has ended.
    await asyncio.to_thread(services.grammars.close)
    if services.tracing is not None:
        await asyncio.to_thread(services.tracing.close)


async def _handle(request: Request, exc: Exception) -> Response:
    if isinstance(exc, HTTPException) and exc.status_code in (404, 405):
        exc = _no_such_route(request, exc)
    return error_response(exc, request.scope)


def _no_such_route(request: Request, exc: HTTPException) -> HTTPException:
    allowed = (exc.headers or {}).get("Allow", "")
    if allowed == "GET":
        allowed = "GET, HEAD"  # routes for GET also answer HEAD, because the middleware turns HEAD into GET
    hint = f"this path takes {allowed}" if allowed else "/docs lists the paths that exist"
    if not allowed and request.app.state.services.config.role == "prefill":
        hint = f"this server computes prompts for decode servers (--role prefill); {hint}"
    detail = f"There is no {request.method} {request.url.path}; {hint}."
    return HTTPException(exc.status_code, detail, headers={"Allow": allowed} if allowed else None)
