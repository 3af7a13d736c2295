"""The application that lines of batches call. The type `Endpoint` in schemas/batches.py lists its endpoints; a further
endpoint is one more line there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, get_args

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from jamba_server.engine.errors import EngineError
from jamba_server.server.http.errors import error_response
from jamba_server.server.http.schemas.batches import Endpoint
from jamba_server.server.http.services import Services

PATHS: Final[tuple[str, ...]] = get_args(Endpoint)


def lines_app(services: Services, routers: Iterable[APIRouter]) -> FastAPI:
    """Returns an application with those routes of the server's `routers` that lines may call. It has none of the
    middleware that protects the server from clients, because the lines of batches have passed it with the upload."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    app.include_router(APIRouter(routes=called_routes(routers)))
    for kind in (EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)
    return app


def called_routes(routers: Iterable[APIRouter]) -> list[BaseRoute]:
    return [
        route
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and route.path in PATHS and "POST" in (route.methods or ())
    ]


async def _handle(request: Request, exc: Exception) -> Response:
    return error_response(exc, request.scope)
