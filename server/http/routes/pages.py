"""The pages for a browser: GET / is the chat page or, with --no-ui, the names and links of this server, and GET /docs
shows its API.

Both pages work without an API key and without internet access.
"""

from __future__ import annotations

from html import escape

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from jamba_server.server.http.middleware import ASSETS_PATH, PAGE_PATH
from jamba_server.server.http.routes.replies import json_response
from jamba_server.server.http.schemas.models import AboutReply
from jamba_server.server.http.services import ServicesOf

NAME = "jamba-server"
NO_ICON = "data:,"  # URL of an empty icon, which keeps a browser from requesting /favicon.ico

router = APIRouter(tags=["operations"])


@router.get("/", response_model=AboutReply)
async def about(request: Request, services: ServicesOf) -> Response:
    """Returns the server's name, version, models and links, as JSON. A browser gets the chat page or, with --no-ui, an
    HTML page with the same data."""
    wants_html = "text/html" in request.headers.get("accept", "")
    if wants_html and services.page is not None:
        response = services.page.document.response(request)
        response.headers["Vary"] = "Accept"
        return response
    root = _prefix(request)
    reply = AboutReply(
        name=NAME,
        version=services.version,
        models=list(services.config.served_model_name),
        links={name: f"{root}/{name}" for name in ("docs", "openapi.json", "v1/models", "health", "metrics")},
    )
    response = HTMLResponse(_page(reply)) if wants_html else json_response(reply)
    response.headers["Vary"] = "Accept"
    return response


@router.get(f"{PAGE_PATH}/{{name}}", include_in_schema=False)
async def page_file(name: str, request: Request, services: ServicesOf) -> Response:
    """Returns one of the files that the chat page loads."""
    if services.page is None or (file := services.page.files.get(name)) is None:
        raise HTTPException(404)
    return file.response(request)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Returns Swagger UI. Its scripts and styles are served by this server."""
    root = _prefix(request)
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=NAME,
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=NO_ICON,
        # By default, Swagger UI sends the OpenAPI document to a validator on the internet.
        swagger_ui_parameters={"validatorUrl": None},
    )


def swagger_assets() -> StaticFiles:
    """Returns the files of Swagger UI. The package fastapi-offline has them; its Python code is not used."""
    return StaticFiles(packages=[("fastapi_offline", "static")])


def _prefix(request: Request) -> str:
    """Returns the path prefix under which a proxy publishes this server, or an empty string if there is no prefix."""
    return request.scope["root_path"].rstrip("/")


def _page(reply: AboutReply) -> str:
    models = ", ".join(f"<code>{escape(name)}</code>" for name in reply.models)
    links = "".join(f'<li><a href="{escape(link)}">{escape(name)}</a></li>' for name, link in reply.links.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="{NO_ICON}">
<title>{escape(reply.name)}</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 4rem auto; padding: 0 1rem }}</style>
</head>
<body>
<h1>{escape(reply.name)} {escape(reply.version)}</h1>
<p>This server answers OpenAI's API under <code>/v1</code> with {models}.</p>
<ul>{links}</ul>
</body>
</html>
"""
