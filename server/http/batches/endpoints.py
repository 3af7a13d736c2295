"""The table of endpoints that lines of batches may call. A further endpoint is one more line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jamba_server.engine.errors import EngineError
from jamba_server.server.http.errors import error_response
from jamba_server.server.http.routes import chat, completions, responses
from jamba_server.server.http.services import Services

ROUTERS: Final[Mapping[str, APIRouter]] = {
    "/v1/chat/completions": chat.router,
    "/v1/completions": completions.router,
    "/v1/responses": responses.router,
}


def lines_app(services: Services) -> FastAPI:
    """Returns an application with these endpoints only. It has none of the middleware that protects the server from
    clients, because the lines of batches have passed it with the upload."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for router in ROUTERS.values():
        app.include_router(router)
    for kind in (EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)
    return app


async def _handle(request: Request, exc: Exception) -> Response:
    return error_response(exc, request.scope)
