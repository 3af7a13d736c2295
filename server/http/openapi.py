"""The OpenAPI document: what FastAPI derives from the routes, and how a client shows its key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

# Either header will do. The names are those that the Authorize button of /docs shows.
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of --api-key, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
}


class App(FastAPI):
    """FastAPI whose document declares the keys. `open_paths` need none; None: the server has no keys."""

    def __init__(self, *, open_paths: frozenset[str] | None, **settings: Any) -> None:
        self._open_paths = open_paths
        super().__init__(**settings)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()  # which keeps it in `openapi_schema`
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in document["paths"].items():
            if self._open_paths is None or path in self._open_paths:
                continue
            for operation in operations.values():
                operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
        return document
