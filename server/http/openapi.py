"""The server's OpenAPI document, from which tools read the paths, requests and replies of the API.

FastAPI derives the document from the routes. The class `App` adds the ways in which a client can send its API key.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

# A client sends its API key in one of two headers. OpenAPI calls each way of sending the key a security scheme. The
# Authorize button of /docs lists the names of the schemes.
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of --api-key, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
}


class App(FastAPI):
    """A FastAPI application whose OpenAPI document says which paths need an API key.

    The argument `open_paths` has the paths that need no key. None means that no path of the server needs a key.
    """

    def __init__(self, *, open_paths: frozenset[str] | None, **settings: Any) -> None:
        self._open_paths = open_paths
        super().__init__(**settings)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()  # this call also stores the document in the attribute `openapi_schema`
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in document["paths"].items():
            if self._open_paths is None or path in self._open_paths:
                continue
            for operation in operations.values():
                operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
        return document
