"""A model hub on a loopback address: one repository, and ways to be slow, closed or strange."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "org/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The files of the hub, and how it behaves. Like the real hub, it sends the SHA-256 checksum of files that end in
    .safetensors or .gguf.

    A file in `damaged` has other bytes than those of its checksum. With `gated`, all files are refused, but not their
    list. `sizes` has false sizes of files. Of the file `stalls`, only the first half comes until `go_on` is set. After
    the first half of the file `cuts`, the connection is closed, once. If `strange` is given, it is the answer to every
    request."""

    files: Mapping[str, bytes]
    stalls: str | None = None
    cuts: str | None = None
    damaged: set[str] = field(default_factory=set[str])
    gated: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    refusal: tuple[int, dict[str, str]] | None = None
    strange: bytes | None = None
    url: str = ""
    fetched: list[tuple[str, str | None]] = field(default_factory=list["tuple[str, str | None]"])  # file, range
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": self.size(name), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.files[name]))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if hub.refusal:
            status, headers = hub.refusal
            self._send(status, b"{}", headers, body=body)
        elif hub.strange is not None:
            self._send(200, hub.strange, {"Content-Type": "application/json"}, body=body)
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            self._send(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"}, body=body)
        elif path in (
            prefix := f"/api/models/{REPOSITORY}",
            *(f"{prefix}/revision/{name}" for name in ("main", COMMIT)),
        ):
            self._send(200, json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode(), {}, body=body)
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        elif path.startswith(prefix := f"/{REPOSITORY}/resolve/{COMMIT}/") and path.removeprefix(prefix) in hub.files:
            self._file(path.removeprefix(prefix), body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _file(self, name: str, *, body: bool) -> None:
        hub, data = self.hub, self.hub.files[name]
        kind = hashlib.sha256 if name.endswith((".safetensors", ".gguf")) else hashlib.sha1
        headers = {"ETag": f'"{kind(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if hub.gated:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
            return
        if not body:
            self._send_head(200, hub.size(name), headers)
            return
        if name in hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range")
        hub.fetched.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send_head(206 if wanted else 200, len(data) - start, headers)
        half = start + (len(data) - start) // 2
        self.wfile.write(data[start:half])
        if name == hub.cuts:
            hub.cuts = None
            self.close_connection = True
            return
        if name == hub.stalls:
            hub.stalled.set()
            hub.go_on.wait()
        with suppress(OSError):  # whoever asked is gone
            self.wfile.write(data[half:])

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], *, body: bool) -> None:
        self._send_head(status, len(data), headers)
        if body:
            self.wfile.write(data)

    def _send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve_hub(hub: Hub) -> Generator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            hub.go_on.set()
            server.shutdown()
            thread.join()
