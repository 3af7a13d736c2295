"""HTTP clients for the load tests in this folder. Each request opens its own connection.

The clients use asyncio's streams and no HTTP library, so that two thousand of them need little CPU time beside the
server, and so that a client can behave badly, for example by closing its connection in the middle of a reply.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS = "/v1/completions"
# The maximum number of bytes in one line of a reply. Each event of a stream is one line.
LINE_LIMIT = 1024 * 1024


@dataclass(slots=True)
class Result:
    """The result of one request. `status` is the HTTP status, or 0 if the connection broke before a status came.

    `first` is the number of seconds from the start of the request to the first event with a token, or None if there was
    no such event. `total` is the number of seconds to the end of the reply. `error` names the exception that ended the
    request, if there was one.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    first: float | None = None
    total: float = 0.0
    num_events: int = 0
    error: str = ""


def head(url: str, path: str, length: int) -> bytes:
    """Returns the request line and the headers of a POST request whose body has `length` bytes. The headers ask the
    server to close the connection after the reply."""
    host = urlsplit(url).netloc
    lines = (f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, "Connection: close", "", "")).encode()


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Async context manager: opens a connection to the server, and closes it at the end of the block, even in the
    middle of a reply."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=LINE_LIMIT)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def post(url: str, body: dict[str, Any], path: str = COMPLETIONS) -> Result:
    """Sends one request, reads the whole reply, and returns the result. A network error is not raised but recorded in
    the result."""
    result, start = Result(), time.monotonic()
    try:
        async with connected(url) as (reader, writer):
            await send(writer, url, body, path)
            await read_head(reader, result)
            async for line in lines_of(reader):
                if is_event_with_token(line):
                    result.first = result.first or time.monotonic() - start
                    result.num_events += 1
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        result.error = type(error).__name__
    result.total = time.monotonic() - start
    return result


async def send(writer: asyncio.StreamWriter, url: str, body: dict[str, Any], path: str = COMPLETIONS) -> None:
    content = json.dumps(body).encode()
    writer.write(head(url, path, len(content)) + content)
    await writer.drain()


async def read_head(reader: asyncio.StreamReader, result: Result) -> None:
    """Reads the status and the headers of a reply into `result`. The names of headers are in lower case."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    result.status = int(status.split()[1])
    result.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def lines_of(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """Yields the lines of a reply's body. In a reply with chunked transfer encoding, the lines with the sizes of the
    chunks are yielded, too."""
    while line := await reader.readline():
        yield line


def is_event_with_token(line: bytes) -> bool:
    return line.startswith(b"data: {") and b'"choices":[{' in line


def percentile(values: list[float], share: float) -> float:
    """Returns a percentile of `values`, which must not be empty, by the nearest-rank method. A `share` of 0.95 gives
    the 95th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
