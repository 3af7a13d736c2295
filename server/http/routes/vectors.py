"""What the routes of requests for vectors have in common."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from fastapi import Request

from jamba_server.engine.types import RequestKind
from jamba_server.server.http.deadlines import set_timeout
from jamba_server.server.http.routes.admission import require, wait_for_start
from jamba_server.server.http.sampling import engine_priority
from jamba_server.server.http.schemas.vectors.fields import VectorBody, VectorUsage, usage_of
from jamba_server.server.http.services import Services
from jamba_server.server.http.unknown_fields import settle_unknown_fields
from jamba_server.server.http.vectors.run import Vector, VectorPrompt, VectorRun, numbered


async def begin(body: VectorBody, request: Request, services: Services, *, kind: RequestKind | None) -> str:
    """Does what every request for vectors begins with, and returns the model's name. Raises ModelCannot if the model
    cannot answer requests of this kind; None means that the route checks this itself."""
    services.lifecycle.admit()
    set_timeout(request.scope, body.timeout)
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    model = services.model(body.model)
    if kind is not None:
        require(services, kind)
    return model


def run_of(body: VectorBody, request: Request, services: Services, *, prefix: str, name: str) -> VectorRun:
    """Returns the run of a request. The ids of its prompts begin with `prefix`."""
    return VectorRun(
        services,
        request.scope,
        id=f"{prefix}-{uuid.uuid4().hex}",
        name=name,
        priority=engine_priority(body.priority, request.scope, enabled=services.config.enable_priority),
        cache_salt=body.cache_salt or "",
    )


async def run_all(run: VectorRun, prompts: Sequence[VectorPrompt]) -> list[Vector]:
    """Returns the vectors of independent prompts, in their order."""
    async with run.admitted(numbered([prompt.token_ids for prompt in prompts])):
        found = await run.vectors({str(position): prompt for position, prompt in enumerate(prompts)})
    return [found[str(position)] for position in range(len(prompts))]


def usage(prompts: Sequence[VectorPrompt], vectors: Sequence[Vector]) -> VectorUsage:
    return usage_of(sum(len(prompt.token_ids) for prompt in prompts), sum(vector.num_cached for vector in vectors))
