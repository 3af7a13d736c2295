"""The files of the chat page. They are read when the application is built, so that no request waits for a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"
DOCUMENT = "index.html"
ROOT_MARK = "{{root}}"  # stands in index.html for the path prefix under which a proxy publishes the server
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page may load scripts, styles and images from this server only, and has none of them inside the HTML.
# `require-trusted-types-for` makes browsers refuse every script that turns a text into HTML, so a reply of the model
# cannot become markup, not even by a mistake in the page's scripts.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file: its bytes, its media type, and the tag by which a browser knows whether its copy is current."""

    content: bytes
    media_type: str
    tag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> PageFile:
        return cls(content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """Returns the file, or status 304 if the browser already has these bytes."""
        headers = {"ETag": self.tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@dataclass(frozen=True, slots=True)
class ChatPage:
    """The HTML document and, by name, the files that it loads."""

    document: PageFile
    files: Mapping[str, PageFile]

    @classmethod
    def read(cls, root_path: str) -> ChatPage:
        """Reads all files. `root_path` is the path prefix under which a proxy publishes the server."""
        contents = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}
        document = contents.pop(DOCUMENT).decode().replace(ROOT_MARK, escape(root_path.rstrip("/")))
        files = {name: PageFile.of(content, Path(name).suffix) for name, content in contents.items()}
        return cls(PageFile.of(document.encode(), Path(DOCUMENT).suffix), files)
