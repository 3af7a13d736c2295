"""What operators ask: health, readiness, version, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import PlainTextResponse, Response

from jamba_server.server.http.routes.replies import json_response
from jamba_server.server.http.schemas.models import HealthReply, VersionReply
from jamba_server.server.http.services import ServicesOf

router = APIRouter(tags=["operations"])


@router.get("/health", response_model=HealthReply, responses={503: {"model": HealthReply}})
async def health(services: ServicesOf) -> Response:
    """Whether this process can still do its work: 503 once the engine is gone for good."""
    state = services.engine.health
    if not state.alive:
        return json_response(HealthReply(status="dead", reason=state.reason), status=503)
    return json_response(HealthReply(status="ok", reason=state.reason or None))


@router.get("/ready", response_model=HealthReply, responses={503: {"model": HealthReply}})
async def ready(services: ServicesOf) -> Response:
    """Whether to send requests here now: 503 while the engine loads or restarts, and while the server shuts down."""
    state = services.engine.health
    if services.lifecycle.draining:
        return json_response(HealthReply(status="not ready", reason="the server is shutting down"), status=503)
    if not (state.alive and state.ready):
        return json_response(HealthReply(status="not ready", reason=state.reason), status=503)
    return json_response(HealthReply(status="ready"))


@router.get("/version", response_model=VersionReply)
async def version(services: ServicesOf) -> Response:
    return json_response(VersionReply(version=services.version))


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, services: ServicesOf) -> Response:
    """Prometheus' text format, or OpenMetrics for a scraper that asks for it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(services.metrics.registry), headers={"Content-Type": content_type})
