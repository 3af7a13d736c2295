"""What a browser opens: GET / says what this is, GET /docs describes the API. Neither needs a network or a key."""

from __future__ import annotations

from html import escape

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from jamba_server.server.http.middleware import ASSETS_PATH
from jamba_server.server.http.routes.replies import json_response
from jamba_server.server.http.schemas.models import AboutReply
from jamba_server.server.http.services import ServicesOf

NAME = "jamba-server"
NO_ICON = "data:,"  # a browser would ask for /favicon.ico

router = APIRouter(tags=["operations"])


@router.get("/", response_model=AboutReply)
async def about(request: Request, services: ServicesOf) -> Response:
    """What this server is and where to go on: JSON, or a page for a browser."""
    root = _prefix(request)
    reply = AboutReply(
        name=NAME,
        version=services.version,
        models=list(services.config.served_model_name),
        links={name: f"{root}/{name}" for name in ("docs", "openapi.json", "v1/models", "health", "metrics")},
    )
    if "text/html" not in request.headers.get("accept", ""):
        response = json_response(reply)
    else:
        response = HTMLResponse(_page(reply))
    response.headers["Vary"] = "Accept"
    return response


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Swagger UI, with scripts and styles that this server has itself."""
    root = _prefix(request)
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=NAME,
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=NO_ICON,
        swagger_ui_parameters={"validatorUrl": None},  # the default is a server on the internet
    )


def swagger_assets() -> StaticFiles:
    """Only the files of fastapi-offline are used: a current Swagger UI in a small package."""
    return StaticFiles(packages=[("fastapi_offline", "static")])


def _prefix(request: Request) -> str:
    """The path under which a proxy publishes this server; empty without one."""
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
