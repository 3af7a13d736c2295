"""The routes for operators: /health, /ready, /live, /version, /server_info and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.models import (
    HealthReply,
    LoadingReply,
    MemoryPlan,
    ServerInfoReply,
    VersionReply,
)
from jamba_server.server.http.services import ServicesOf

router = APIRouter(tags=["operations"])


@router.get("/health", response_model=HealthReply, responses={503: {"model": LoadingReply | HealthReply}})
async def health(services: ServicesOf) -> Response:
    """Answers 503 until the model has loaded and after the engine has failed for good, and 200 otherwise.

    The status stays 200 while the engine restarts.
    """
    state = services.engine.health
    if state.loading is not None:
        phase, fraction = state.loading.phase, state.loading.fraction
        reply = LoadingReply(status="loading", reason=state.reason, phase=phase, fraction=fraction)
        return json_response(reply, status=503)
    if not state.alive:
        return json_response(HealthReply(status="dead", reason=state.reason), status=503)
    return json_response(HealthReply(status="ok", reason=state.reason or None))


@router.get("/ready", response_model=HealthReply, responses={503: {"model": HealthReply}})
async def ready(services: ServicesOf) -> Response:
    """Answers 200 if this server accepts requests now, and 503 while the engine loads or restarts or the server shuts
    down."""
    state = services.engine.health
    if services.lifecycle.draining:
        return json_response(HealthReply(status="not ready", reason="the server is shutting down"), status=503)
    if not (state.alive and state.ready):
        return json_response(HealthReply(status="not ready", reason=state.reason), status=503)
    return json_response(HealthReply(status="ready"))


@router.get("/live", response_model=HealthReply)
async def live() -> Response:
    """Answers 200 as long as the HTTP process responds, whatever the state of the engine."""
    return json_response(HealthReply(status="live"))


@router.get("/version", response_model=VersionReply)
async def version(services: ServicesOf) -> Response:
    return json_response(VersionReply(version=services.version))


@router.get("/server_info", response_model=ServerInfoReply, responses=ERRORS)
async def server_info(services: ServicesOf) -> Response:
    """Returns what the engine loaded and how it divides its memory. Answers 503 until the model has loaded."""
    info = services.engine.info
    memory = MemoryPlan(
        weight_bytes=info.weight_bytes,
        kv_bytes=info.kv_bytes,
        kv_tokens=info.num_kv_blocks * info.block_size,
        state_bytes=info.state_bytes,
        running_sequences=info.max_num_seqs,
        saved_states=info.num_saved_states,
    )
    reply = ServerInfoReply(
        version=services.version,
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        device=info.device,
        dtype=info.dtype,
        quantization=info.quantization,
        activation_quantization=info.activation_quantization,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_num_mixed_tokens=info.max_num_mixed_tokens,
        memory=memory,
        kernels=info.kernels,
        batch_invariant=not info.batch_dependent_ops,
        load_seconds=info.load_seconds,
        data_parallel_size=services.config.data_parallel_size,
    )
    return json_response(reply)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, services: ServicesOf) -> Response:
    """Returns the metrics in Prometheus' text format, or in OpenMetrics if the Accept header asks for it."""
    content, content_type = services.metrics.encoded(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})
