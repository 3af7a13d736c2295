"""The OpenAPI document: FastAPI derives it from the routes, and `App` adds how a client sends its API key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

# A client may send its API key in either of these headers. Each is a security scheme, and the Authorize button of
# /docs shows its name.
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of --api-key, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
}


class App(FastAPI):
    """A FastAPI application whose OpenAPI document says which paths need an API key.

    `open_paths` are the paths that need no key. None means that the server has no keys.
    """

    def __init__(self, *, open_paths: frozenset[str] | None, **settings: Any) -> None:
        self._open_paths = open_paths
        super().__init__(**settings)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()  # FastAPI also stores the document in `openapi_schema`
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in document["paths"].items():
            if self._open_paths is None or path in self._open_paths:
                continue
            for operation in operations.values():
                operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
        return document
