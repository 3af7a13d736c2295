"""The middleware that every request passes before the function of its route is called.

The classes are plain ASGI middleware, so that the events of a stream are sent at once and not buffered. A request
passes `RequestContext`, `ApiKey`, `limits.KeyLimits`, `JsonBody` and `streams.Resumption`, in this order. The class
`RequestContext` also turns the exceptions that the others raise into error replies.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from urllib.parse import quote

import anyio
import anyio.to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.anthropic_errors import speaks_anthropic
from jamba_server.server.http.deadlines import set_arrival
from jamba_server.server.http.errors import CLIENT_CLOSED_REQUEST, error_response, tenant_of
from jamba_server.server.http.limits.bodies import BodyMemory, BodyShare
from jamba_server.server.http.limits.keys import Keys
from jamba_server.server.http.log_fields import fields
from jamba_server.server.http.metrics import Metrics
from jamba_server.server.http.security_headers import add_security_headers

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 32_768  # maximum number of objects and lists in a body; validating one takes about 10 us
# Maximum number of values in all lists and objects of a body together: twice the number of tokens in Jamba's longest
# context. While a body is parsed and validated, all other requests wait, for about 0.2 us per value of the body.
MAX_JSON_VALUES = 524_288
MAX_JSON_NAMES = 65_536  # maximum number of fields in a body; an unknown name is compared with all known names
MAX_JSON_DIGITS = 4300  # maximum number of digits of a whole number, which is Python's own limit
MAX_LOGGED_PATH_CHARS = 256
# Maximum size, in bytes, of a body that is checked in the event loop. A larger body is checked in a thread, because its
# check would block the event loop too long.
CHECKED_AT_ONCE_BYTES = 64 * 1024
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:-]")
# Matches a JSON string, even if its closing quote is missing. The possessive quantifiers (`*+`) never backtrack, so the
# time of a search is proportional to the length of the text.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# A body with a too long number has the text _LONG_NUMBER if all its digits are replaced by 0. The search for a text
# takes a time proportional to the length of the body, unlike that for a regular expression with a count.
_TO_ZERO, _LONG_NUMBER = bytes.maketrans(b"123456789", b"0" * 9), b"0" * (MAX_JSON_DIGITS + 1)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
ASSETS_PATH = "/docs/assets"
PAGE_PATH = "/page"  # the folder of the files that the chat page loads
# Bodies of requests to these paths are no JSON and are read by the routes while they arrive.
RAW_PATHS = frozenset({"/v1/files", "/v1/sessions/import"})
PROBE_PATHS = frozenset({"/health", "/live", "/ready"})
# These paths need no API key. A browser that opens a page cannot send a key, a health probe often has no key, and the
# replies on these paths have no secrets.
OPEN_PATHS = PROBE_PATHS | {"/", "/docs", "/openapi.json", "/api/hello"}


class RequestContext:
    """Gives each request an id, counts and logs the request, and turns exceptions into error replies.

    The argument `root_path` is the path prefix under which a proxy publishes the server. It does not matter whether the
    proxy removes this prefix from the paths of requests. The argument `tls` says whether clients reach the server over
    TLS.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, root_path: str, tls: bool) -> None:
        self.app, self.metrics, self.root_path, self.tls = app, metrics, root_path, tls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = clean_request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        scope["root_path"] = self.root_path or scope.get("root_path", "")
        set_arrival(scope, asyncio.get_running_loop().time())
        inner = _canonical(scope)  # the function `_canonical` reads scope["root_path"]
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if speaks_anthropic(scope):
                    # Anthropic's clients read the request id from a header of this name.
                    headers["request-id"] = request_id
                headers.update(scope["state"].get("reply_headers", {}))
                add_security_headers(headers, tls=self.tls)
            await send(message)

        try:
            await self.app(inner, receive, send_with_id)
        except Exception as exc:
            if status:
                raise
            await error_response(exc, scope)(scope, receive, send_with_id)
        finally:
            status = status or CLIENT_CLOSED_REQUEST
            route: str = getattr(inner.get("route"), "path", "other")
            scope["state"]["route"] = route
            self.metrics.count_http_request(route, status)
            logger.log(
                # Failed health probes are logged only at DEBUG, because orchestrators repeat them every few seconds.
                logging.INFO if status >= 400 and scope["path"] not in PROBE_PATHS else logging.DEBUG,
                "request_id=%s %s %s: %d in %.3f s",
                request_id, scope["method"], _printable(scope["path"]), status, time.monotonic() - started,
                extra=fields(request_id=request_id, status=status, tenant=tenant_of(scope)),
            )  # fmt: skip


class ApiKey:
    """Refuses requests that have none of the valid API keys.

    The paths in the argument `open_paths`, and the paths of the files that the pages / and /docs load, need no key.

    A client sends the key as a bearer token in the header `authorization`, or in the header `x-api-key`. If a client
    sends both headers, one header with a valid key is enough, because the other header might hold a placeholder or the
    key of a gateway.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, open_paths: frozenset[str]) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._open(_route_path(scope)):
            await self.app(scope, receive, send)
            return
        if (owner := self._owner(Headers(scope=scope))) is not None:
            scope["state"]["tenant"] = owner
            await self.app(scope, receive, send)
            return
        raise HTTPException(
            401,
            "Missing or incorrect API key. Send the header `Authorization: Bearer KEY` or `x-api-key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _open(self, path: str) -> bool:
        return path in self.open_paths or path.startswith((f"{ASSETS_PATH}/", f"{PAGE_PATH}/"))

    def _owner(self, headers: Headers) -> str | None:
        """Returns the owner of the valid key in the request's headers, or None if there is no valid key."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()]
        return self.keys.owner_of([_latin_1(key) for key in sent])


class JsonBody:
    """Reads and checks the whole body of a request, and then calls the application. Uploads of files are not read.

    A body is refused if it is too large, nested too deeply, not in UTF-8 or not of the media type JSON.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        memory: BodyMemory,
        whole_timeout: float = 120.0,
        body_timeout: float = 30.0,
    ) -> None:
        """The argument `max_bytes` is the maximum size of a body, in bytes. The bodies of all requests together are
        counted in `memory`.

        A whole body must arrive within `whole_timeout` seconds, and the next part of a body within `body_timeout`
        seconds. If more seconds pass, the client gets status 408.
        """
        self.app, self.max_bytes, self.memory = app, max_bytes, memory
        self.whole_timeout, self.body_timeout = whole_timeout, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] not in ("POST", "PUT", "PATCH")
            or not _has_route(scope)
            or _route_path(scope) in RAW_PATHS
        ):
            await self.app(scope, receive, send)
            return
        with BodyShare(self.memory) as share:
            await self._serve(scope, receive, send, share)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, share: BodyShare) -> None:
        body = await self._read(Headers(scope=scope), receive, share)
        if len(body) > CHECKED_AT_ONCE_BYTES:
            await anyio.to_thread.run_sync(check_json, body)
        else:
            check_json(body)
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive, share: BodyShare) -> bytes:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not media_type and headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return b""  # some endpoints take no body
        if media_type != "application/json":
            raise HTTPException(415, f"Content-Type is {media_type[:64]!r}; it must be application/json.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.whole_timeout):
                return await self._read_parts(receive, share)
        except TimeoutError:
            raise HTTPException(408, f"The body is not complete after {self.whole_timeout:g} s.") from None

    async def _read_parts(self, receive: Receive, share: BodyShare) -> bytes:
        chunks: list[bytes] = []
        more = True
        while more:
            try:
                # This code does not use asyncio.wait_for, because in Python 3.11 that function may swallow the
                # cancellation by which the outer time limit ends this task.
                async with asyncio.timeout(self.body_timeout):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"No more of the body arrived for {self.body_timeout:g} s, and it is not complete."
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            chunks.append(chunk)
            if share.size + len(chunk) > self.max_bytes:
                raise self._too_large()
            share.grow(len(chunk))
        return b"".join(chunks)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than the limit of {self.max_bytes} bytes.")


def clean_request_id(sent: str) -> str:
    """Returns the request id that the client sent, without the characters that are unsafe in a header or a log line.

    If the client sent no id, or if all characters of the client's id are unsafe, a new id is returned.
    """
    return _NOT_IN_REQUEST_ID.sub("", sent[:MAX_REQUEST_ID_CHARS]) or uuid.uuid4().hex


def check_json(body: bytes, *, name: str = "body") -> None:
    """Raises RequestRejected for bodies that a JSON parser accepts but that would do harm after parsing.

    These bodies are not in UTF-8, are nested too deeply, have too many values, fields or containers, have a number with
    too many digits, or have one half of a UTF-16 surrogate pair without the other half. Error messages call the body by
    the word `name`.
    """
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        raise RequestRejected(f"The {name} is not valid UTF-8 at byte {exc.start}.", code="invalid_json") from exc
    if b"\0" in body:  # JSON in UTF-16 or UTF-32 has zero bytes; JSON in UTF-8 has no zero bytes
        raise RequestRejected(f"The {name} has zero bytes; it must be JSON in UTF-8.", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        _check_structure(body, name)
    if body.count(b",") >= MAX_JSON_VALUES or body.count(b":") > MAX_JSON_NAMES:
        _check_numbers(body, name)
    if _LONG_NUMBER in body.translate(_TO_ZERO) and _LONG_NUMBER in _JSON_STRING.sub(b"", body).translate(_TO_ZERO):
        raise RequestRejected(
            f"The {name} has a number with more digits than the limit of {MAX_JSON_DIGITS}.", code="invalid_json"
        )
    if _SURROGATE_ESCAPE.search(body):
        _check_surrogates(body)


def _check_structure(body: bytes, name: str) -> None:
    brackets = _JSON_STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    depth = 0
    for bracket in brackets[: 2 * MAX_JSON_CONTAINERS]:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise RequestRejected(f"The {name} nests deeper than the limit of {MAX_JSON_DEPTH}.", code="invalid_json")
    if len(brackets) > 2 * MAX_JSON_CONTAINERS:
        raise RequestRejected(
            f"The {name} has more objects and lists than the limit of {MAX_JSON_CONTAINERS}.", code="invalid_json"
        )


def _check_numbers(body: bytes, name: str) -> None:
    structure = _JSON_STRING.sub(b"", body)
    if structure.count(b",") >= MAX_JSON_VALUES:
        raise RequestRejected(
            f"The {name} has more values than the limit of {MAX_JSON_VALUES}, in all of its lists and objects "
            "together.",
            code="invalid_json",
        )
    if structure.count(b":") > MAX_JSON_NAMES:
        raise RequestRejected(
            f"The {name} has more fields than the limit of {MAX_JSON_NAMES}, in all of its objects together.",
            code="invalid_json",
        )


def _check_surrogates(body: bytes) -> None:
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise RequestRejected(
            r"A string has half of a UTF-16 surrogate pair (\ud800 to \udfff).", code="invalid_json"
        ) from exc
    except ValueError:
        return  # the application refuses malformed JSON later, with the position of the error


def _canonical(scope: Scope) -> Scope:
    """Returns a copy of the ASGI scope with the method and the path in the form that the routes expect.

    The method HEAD becomes GET, except for streams, of which only one connection gets the events. The HTTP server
    leaves out the body of the reply to HEAD. A slash at the end of the
    path is removed. If the proxy has removed its path prefix, the prefix is added again, because ASGI requires it in
    the path.
    """
    method, path, root = scope["method"], scope["path"].rstrip("/"), scope["root_path"]
    if path != root and not path.startswith(f"{root}/"):
        path = root + path
    return {
        **scope,
        "method": "GET" if method == "HEAD" and "/v1/streams/" not in path else method,
        "path": f"{path}/" if path == root else path,
    }


def _has_route(scope: Scope) -> bool:
    """Returns whether the application has a route for the request's path and method. If there is no such route,
    the router answers 404 or 405, and the body need not be read."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes if not isinstance(route, Mount))


def _latin_1(header: str) -> bytes:
    """Returns the value of a header as the bytes that the client sent. Starlette has decoded these bytes as Latin-1."""
    return header.encode("latin-1")


def _printable(path: str) -> str:
    """Returns the path for a log line: percent-encoded, so that a line feed cannot forge a line, and cut at its end."""
    return quote(path)[:MAX_LOGGED_PATH_CHARS]


def _route_path(scope: Scope) -> str:
    """Returns the request's path as the routes declare it: without the prefix under which a proxy publishes the
    server."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    return path.removeprefix(root_path) if path.startswith(f"{root_path}/") else path
