"""The routes GET /v1/models and GET /v1/models/{model}."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.server.demo import DESCRIPTION
from jamba_server.server.http.routes.admission import wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.schemas.models import ModelCard, ModelList
from jamba_server.server.http.services import Services, ServicesOf

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(request: Request, services: ServicesOf) -> Response:
    """Lists the names under which the model is served, with its context length."""
    await wait_for_start(request, services)
    return json_response(ModelList(data=[_card(name, services) for name in services.config.served_model_name]))


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=ERRORS)
async def retrieve_model(model: str, request: Request, services: ServicesOf) -> Response:
    await wait_for_start(request, services)
    return json_response(_card(services.model(model), services))


def _card(name: str, services: Services) -> ModelCard:
    return ModelCard(
        id=name,
        created=services.created,
        root=services.config.served_model_name[0],
        max_model_len=services.engine.info.max_model_len,
        demonstration=services.demo,
        description=DESCRIPTION if services.demo else None,
    )
